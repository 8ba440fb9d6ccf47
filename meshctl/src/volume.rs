//! The all-to-all arithmetic: what the formula says of a run, and how far deduplication brings it down.

use mesh_proto::v1::{ModelInfo, NodeStatus};

/// Bytes that the attention nodes sent as dispatch and received as combine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Rows sent, without headers and metadata.
    pub dispatch: u64,
    /// Rows received.
    pub combine: u64,
}

impl Measured {
    /// The sum over the attention nodes.
    pub fn of(nodes: &[NodeStatus]) -> Self {
        let loads = nodes.iter().filter(|n| n.role == "attention").filter_map(|n| n.load.as_ref());
        loads.fold(Self::default(), |sum, load| Self {
            dispatch: sum.dispatch + load.dispatch_bytes,
            combine: sum.combine + load.combine_bytes,
        })
    }

    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            dispatch: self.dispatch.saturating_sub(before.dispatch),
            combine: self.combine.saturating_sub(before.combine),
        }
    }

    /// Both ways together.
    pub fn total(self) -> u64 {
        self.dispatch + self.combine
    }
}

/// What went through the model, and so through every MoE layer's all-to-all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Tokens computed: B x S. Of a prompt of p and an answer of n tokens, p + n - 1: the last is never fed back.
    pub tokens: u64,
    /// Elements of a row.
    pub hidden: u64,
    /// Bytes of an element.
    pub bytes: u64,
    /// Experts per token.
    pub top_k: u64,
    /// MoE layers.
    pub layers: u64,
}

impl Volume {
    /// The volume of one request on a model; `None` for a dtype that is not known.
    pub fn of(model: &ModelInfo, prompt_tokens: u32, completion_tokens: u32) -> Option<Self> {
        let bytes = match model.dtype.as_str() {
            "f32" => 4,
            "bf16" => 2,
            _ => return None,
        };
        Some(Self {
            tokens: (u64::from(prompt_tokens) + u64::from(completion_tokens)).saturating_sub(1),
            hidden: model.hidden.into(),
            bytes,
            top_k: model.top_k.into(),
            layers: model.moe_layers.len() as u64,
        })
    }

    /// One way, one MoE layer, every row once: B x S x H x bytes.
    pub fn one_way(&self) -> u64 {
        self.tokens * self.hidden * self.bytes
    }

    /// The formula, one MoE layer: 2 x B x S x H x bytes.
    pub fn per_layer(&self) -> u64 {
        2 * self.one_way()
    }

    /// One way over all MoE layers with a row for each (token, expert) pair: before deduplication.
    pub fn pairs_one_way(&self) -> u64 {
        self.one_way() * self.top_k * self.layers
    }

    /// The lines that the demo prints.
    pub fn report(&self, measured: Measured) -> String {
        let Self { tokens, hidden, bytes, top_k, layers } = *self;
        let (formula, pairs) = (self.per_layer() * layers, 2 * self.pairs_one_way());
        let factor = self.pairs_one_way() as f64 / measured.dispatch.max(1) as f64;
        let per_layer = measured.total() / layers.max(1);
        format!(
            "all-to-all volume, {tokens} tokens through {layers} MoE layers\n  \
             formula   2 x B x S x H x bytes = 2 x {tokens} x {hidden} x {bytes} = {} B a layer, {formula} B in all\n  \
             x top-{top_k}   before deduplication: {} B a layer, {pairs} B in all\n  \
             measured  {per_layer} B a layer, {} B in all: dispatch {} B (a row travels once to a node: {factor:.2}x saved), \
             combine {} B (one row for each token and expert)\n",
            self.per_layer(),
            self.per_layer() * top_k,
            measured.total(),
            measured.dispatch,
            measured.combine,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::v1::NodeLoad;

    fn model() -> ModelInfo {
        ModelInfo { dtype: "bf16".into(), hidden: 192, top_k: 2, moe_layers: vec![0, 1, 2, 3], ..ModelInfo::default() }
    }

    #[test]
    fn the_last_token_never_passes_through_the_model() {
        let volume = Volume::of(&model(), 4, 64).unwrap();
        assert_eq!(volume.tokens, 67);
        assert_eq!(volume.per_layer(), 2 * 67 * 192 * 2);
        assert_eq!(volume.pairs_one_way(), 67 * 192 * 2 * 2 * 4);
        assert_eq!(Volume::of(&ModelInfo { dtype: "int3".into(), ..model() }, 1, 1), None);
    }

    #[test]
    fn what_was_measured_is_the_attention_nodes_difference() {
        let node = |role: &str, dispatch_bytes, combine_bytes| {
            let load = NodeLoad { dispatch_bytes, combine_bytes, ..NodeLoad::default() };
            NodeStatus { role: role.into(), load: Some(load), ..NodeStatus::default() }
        };
        let before = Measured::of(&[node("attention", 10, 20), node("expert", 500, 500)]);
        let after = Measured::of(&[node("attention", 11, 22), node("attention", 100, 200), node("expert", 900, 900)]);
        assert_eq!(after.since(before), Measured { dispatch: 101, combine: 202 });
        assert_eq!(after.since(before).total(), 303);
    }

    #[test]
    fn the_report_says_what_deduplication_saved() {
        let volume = Volume::of(&model(), 4, 64).unwrap();
        let pairs = volume.pairs_one_way();
        let report = volume.report(Measured { dispatch: pairs / 2, combine: pairs });
        assert!(report.contains("2.00x saved"), "{report}");
        assert!(report.contains("2 x 67 x 192 x 2 = 51456 B a layer, 205824 B in all"), "{report}");
    }
}
