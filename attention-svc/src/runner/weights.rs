//! The trunk's weights: everything of the model but its routed experts, packed for a compute backend.

use std::sync::Arc;

use mesh_core::LayerId;
use mesh_kernels::packed::Packer;
use mesh_kernels::rows::MatrixView;
use mesh_kernels::{Dtype, Ffn, Matrix, Rope};
use mesh_model::{Checkpoint, FfnTensors, LayerKind, ModelConfig, ModelError, TensorView, WeightDtype};

/// What follows attention in a layer.
pub(super) enum Mlp {
    /// A feed-forward network that this node runs itself.
    Dense(Ffn),
    /// Routed experts, elsewhere; here is their gate, `[experts, hidden]`.
    Moe(Matrix),
}

/// One layer of the trunk.
pub(super) struct TrunkLayer {
    pub input_norm: Vec<f32>,
    /// q, k and v stacked: `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    pub qkv: Matrix,
    pub qkv_bias: Option<Vec<f32>>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub out: Matrix,
    pub out_bias: Option<Vec<f32>>,
    pub post_norm: Vec<f32>,
    pub mlp: Mlp,
}

/// All that an attention node computes with.
pub struct Trunk {
    checkpoint: Arc<Checkpoint>,
    pub(super) layers: Vec<TrunkLayer>,
    pub(super) final_norm: Vec<f32>,
    pub(super) head: Matrix,
    pub(super) rope: Rope,
}

impl Trunk {
    /// Packs the trunk out of a checkpoint. `progress` is told of every tensor's bytes as it is done;
    /// [`Checkpoint::trunk_bytes`] is their sum.
    ///
    /// # Errors
    /// [`ModelError`] as the checkpoint's accessors give it.
    pub fn load(
        checkpoint: Arc<Checkpoint>,
        packer: &Packer,
        mut progress: impl FnMut(u64),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, kind) in config.layers.iter().enumerate() {
            layers.push(load_layer(&checkpoint, packer, LayerId(i as u16), *kind, &mut progress)?);
        }
        let final_norm = vector(checkpoint.final_norm()?);
        let head = pack(&checkpoint, packer, "head", &[checkpoint.head()?], &mut progress);
        let rope = Rope { inv_freq: config.rope.inv_freq(config.head_dim), scale: config.rope.attention_factor() };
        Ok(Self { layers, final_norm, head, rope, checkpoint })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// Widens a token's embedding into `out`, `hidden` elements. The token is below the vocabulary's size.
    ///
    /// # Errors
    /// [`ModelError`] as the checkpoint's accessor gives it.
    pub(super) fn embed(&self, token: u32, out: &mut [f32]) -> Result<(), ModelError> {
        let table = self.checkpoint.embedding()?;
        match table.dtype {
            WeightDtype::F32 => {
                let row = &table.bytes[token as usize * out.len() * 4..][..out.len() * 4];
                for (o, b) in out.iter_mut().zip(row.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            WeightDtype::Bf16 => {
                let row = &table.bytes[token as usize * out.len() * 2..][..out.len() * 2];
                for (o, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                    *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                }
            }
        }
        Ok(())
    }
}

fn load_layer(
    checkpoint: &Checkpoint,
    packer: &Packer,
    layer: LayerId,
    kind: LayerKind,
    progress: &mut impl FnMut(u64),
) -> Result<TrunkLayer, ModelError> {
    let attention = checkpoint.attention(layer)?;
    let biases = [attention.q_bias, attention.k_bias, attention.v_bias];
    let qkv_bias = biases.iter().all(Option::is_some).then(|| biases.into_iter().flatten().flat_map(vector).collect());
    // Names of packed weights: changing one only makes a cache pack it again.
    let name = |part: &str| format!("layer-{}.{part}", layer.0);
    let mlp = match kind {
        LayerKind::Dense => {
            let FfnTensors { gate, up, down } = checkpoint.dense(layer)?;
            let ffn = packer.pack_ffn(&name("dense"), matrix(gate), matrix(up), matrix(down));
            for tensor in [gate, up, down] {
                progress(tensor.bytes.len() as u64);
                checkpoint.release(tensor);
            }
            Mlp::Dense(ffn)
        }
        LayerKind::Moe => Mlp::Moe(pack(checkpoint, packer, &name("gate"), &[checkpoint.gate(layer)?], progress)),
    };
    Ok(TrunkLayer {
        input_norm: vector(attention.input_norm),
        qkv: pack(checkpoint, packer, &name("qkv"), &[attention.q, attention.k, attention.v], progress),
        qkv_bias,
        q_norm: attention.q_norm.map(vector),
        k_norm: attention.k_norm.map(vector),
        out: pack(checkpoint, packer, &name("out"), &[attention.o], progress),
        out_bias: attention.o_bias.map(vector),
        post_norm: vector(checkpoint.post_norm(layer)?),
        mlp,
    })
}

fn vector(tensor: TensorView<'_>) -> Vec<f32> {
    mesh_model::to_f32(tensor)
}

fn pack(
    checkpoint: &Checkpoint,
    packer: &Packer,
    name: &str,
    tensors: &[TensorView<'_>],
    progress: &mut impl FnMut(u64),
) -> Matrix {
    let parts: Vec<MatrixView<'_>> = tensors.iter().map(|t| matrix(*t)).collect();
    let packed = packer.pack(name, &parts);
    for tensor in tensors {
        progress(tensor.bytes.len() as u64);
        checkpoint.release(*tensor);
    }
    packed
}

/// A checkpoint's two-dimensional tensor as the kernels take it.
pub(super) fn matrix(tensor: TensorView<'_>) -> MatrixView<'_> {
    let dtype = match tensor.dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::Bf16 => Dtype::Bf16,
    };
    MatrixView { dtype, n: tensor.shape[0], k: tensor.shape[1], bytes: tensor.bytes }
}
