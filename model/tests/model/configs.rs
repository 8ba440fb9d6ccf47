//! Configs in every style, and those that are refused by the key that is wrong.

use std::fs;

use mesh_model::{LayerKind, ModelConfig, ModelError, RopeScaling};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{config, config_with, fixture};

fn parse(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::parse(&config.to_string())
}

#[test]
fn a_config_of_transformers_5_is_the_published_one() {
    let five = fs::read_to_string(fixture("checkpoints/qwen3moe-v5config/config.json")).unwrap();
    let mut published: Value = serde_json::from_str(&five).unwrap();
    let keys = published.as_object_mut().unwrap();
    let rope = keys.remove("rope_parameters").unwrap();
    keys.insert("rope_theta".into(), rope["rope_theta"].clone());
    keys.insert("rope_scaling".into(), Value::Null);
    let experts = keys.remove("num_local_experts").unwrap();
    keys.insert("num_experts".into(), experts);
    let dtype = keys.remove("dtype").unwrap();
    keys.insert("torch_dtype".into(), dtype);
    let five = ModelConfig::parse(&five).unwrap();
    assert_eq!(five, parse(&published).unwrap());
    assert_eq!((five.moe.experts, five.rope.theta, five.rope.scaling), (8, 1e6, RopeScaling::None));
}

#[test]
fn scaling_is_the_same_in_either_style_and_under_either_name() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    let typed = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    let mut five = yarn.clone();
    five["rope_theta"] = json!(10000.0);
    let published = parse(&config_with(json!({"rope_scaling": yarn}))).unwrap();
    assert!(matches!(published.rope.scaling, RopeScaling::Yarn { original_max_position: 16, truncate: true, .. }));
    assert_eq!(published, parse(&config_with(json!({"rope_scaling": typed}))).unwrap());
    let five = json!({"rope_parameters": five, "rope_theta": "(absent)", "rope_scaling": "(absent)"});
    assert_eq!(published, parse(&config_with(five)).unwrap());
    let bare = json!({"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": "(absent)"});
    assert_eq!(parse(&config()).unwrap(), parse(&config_with(bare)).unwrap());
}

#[test]
fn layers_are_dense_by_list_and_by_step() {
    use LayerKind::{Dense, Moe};
    let layers = |changes| parse(&config_with(changes)).unwrap().layers;
    assert_eq!(layers(json!({"num_hidden_layers": 4, "mlp_only_layers": [0, 2]})), [Dense, Moe, Dense, Moe]);
    let stepped = json!({"num_hidden_layers": 5, "mlp_only_layers": [3], "decoder_sparse_step": 2});
    assert_eq!(layers(stepped), [Dense, Moe, Dense, Dense, Dense]);
    let plain = parse(&config_with(json!({"mlp_only_layers": []}))).unwrap();
    assert_eq!((plain.layers, plain.dense_intermediate), (vec![Moe, Moe], 0));
}

#[test]
fn a_window_counts_only_where_the_family_uses_it() {
    let window = |changes| parse(&config_with(changes)).unwrap().sliding_window;
    assert_eq!(window(json!({"sliding_window": 8})), None);
    assert_eq!(window(json!({"sliding_window": 8, "use_sliding_window": true})), Some(8));
    let mixtral = json!({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": 8});
    assert_eq!(window(mixtral), Some(8));
}

#[test]
fn ends_of_text_come_from_the_generation_config_first() {
    let dir = tempfile::tempdir().unwrap();
    let eos = || ModelConfig::from_dir(dir.path()).map(|c| (c.eos, c.bos));
    fs::write(dir.path().join("config.json"), config_with(json!({"eos_token_id": [1, 2]})).to_string()).unwrap();
    assert_eq!(eos().unwrap(), (vec![1, 2], None));
    let generation = dir.path().join("generation_config.json");
    fs::write(&generation, r#"{"eos_token_id": [3, 4], "bos_token_id": 5}"#).unwrap();
    assert_eq!(eos().unwrap(), (vec![3, 4], Some(5)));
    fs::write(&generation, r#"{"eos_token_id": 6}"#).unwrap();
    assert_eq!(eos().unwrap(), (vec![6], None));
    fs::write(&generation, r#"{"do_sample": false}"#).unwrap();
    assert_eq!(eos().unwrap(), (vec![1, 2], None));
    fs::write(&generation, r#"{"eos_token_id": "end"}"#).unwrap();
    assert!(matches!(eos(), Err(ModelError::BadKey { key, .. }) if key == "generation_config.eos_token_id"));
    fs::write(&generation, "{").unwrap();
    assert!(matches!(eos(), Err(ModelError::BadJson { file, .. }) if file == generation));
}

#[test]
fn an_unknown_architecture_is_told_which_are_supported() {
    let cases = [
        json!({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}),
        json!({"architectures": ["MixtralForSequenceClassification"], "model_type": "mixtral"}),
        json!({"architectures": "(absent)", "model_type": "llama"}),
    ];
    for case in cases {
        let refusal = parse(&config_with(case)).unwrap_err();
        assert!(matches!(refusal, ModelError::UnknownArchitecture { .. }), "{refusal}");
        for supported in ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"] {
            assert!(refusal.to_string().contains(supported), "{refusal}");
        }
    }
    let torn = parse(&config_with(json!({"model_type": "olmoe"})));
    assert!(matches!(torn, Err(ModelError::Contradiction { .. })), "{torn:?}");
    assert!(parse(&config_with(json!({"architectures": "(absent)"}))).is_ok());
    assert!(parse(&config_with(json!({"model_type": "(absent)"}))).is_ok());
}

#[test]
fn a_refusal_names_the_key_that_is_wrong() {
    let cases = [
        json!({"hidden_size": 0}),
        json!({"hidden_size": "12"}),
        json!({"hidden_size": -12}),
        json!({"hidden_size": 1e30}),
        json!({"hidden_size": "(absent)"}),
        json!({"num_hidden_layers": 100_000}),
        json!({"num_attention_heads": 0}),
        json!({"num_key_value_heads": 3}),
        json!({"head_dim": 5}),
        json!({"vocab_size": 1u64 << 40}),
        json!({"max_position_embeddings": 0}),
        json!({"num_experts": 0}),
        json!({"num_experts": 70_000}),
        json!({"num_local_experts": 8}),
        json!({"num_experts_per_tok": 4}),
        json!({"num_experts_per_tok": 0}),
        json!({"moe_intermediate_size": "(absent)"}),
        json!({"intermediate_size": "(absent)"}),
        json!({"norm_topk_prob": "(absent)"}),
        json!({"norm_topk_prob": 1}),
        json!({"mlp_only_layers": [2]}),
        json!({"mlp_only_layers": [0, 1]}),
        json!({"mlp_only_layers": 0}),
        json!({"decoder_sparse_step": 0}),
        json!({"rms_norm_eps": 0}),
        json!({"rms_norm_eps": "(absent)"}),
        json!({"rope_theta": "(absent)"}),
        json!({"rope_theta": 1.0}),
        json!({"rope_scaling": 4}),
        json!({"rope_scaling": {"factor": 4.0}}),
        json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
        json!({"rope_scaling": {"rope_type": "longrope"}}),
        json!({"rope_scaling": {"rope_type": "linear"}}),
        json!({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}),
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}}),
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        json!({"hidden_act": "gelu"}),
        json!({"torch_dtype": "float16"}),
        json!({"quantization_config": {"quant_method": "fp8"}}),
        json!({"partial_rotary_factor": 0.5}),
        json!({"attention_bias": "no"}),
        json!({"eos_token_id": [1, -2]}),
        json!({"eos_token_id": vec![1; 65]}),
        json!({"architectures": "Qwen3MoeForCausalLM"}),
    ];
    for case in cases {
        let key = case.as_object().unwrap().keys().next().unwrap().clone();
        let refusal = parse(&config_with(case.clone())).err().unwrap_or_else(|| panic!("{case} was accepted"));
        assert!(refusal.to_string().contains(&key), "{case}: {refusal}");
    }
}

#[test]
fn a_head_width_is_derived_only_where_that_is_sound() {
    let derived = |changes| parse(&config_with(changes)).map(|c| c.head_dim);
    assert_eq!(derived(json!({"head_dim": "(absent)", "num_attention_heads": 2})).unwrap(), 6);
    let odd = derived(json!({"head_dim": "(absent)"}));
    assert!(matches!(odd, Err(ModelError::BadKey { ref key, .. }) if key == "head_dim"), "{odd:?}");
    let uneven = derived(json!({"head_dim": null, "num_attention_heads": 8}));
    assert!(matches!(uneven, Err(ModelError::Contradiction { .. })), "{uneven:?}");
}

#[test]
fn text_that_is_no_config_is_refused() {
    for text in ["", "{", "[]", "null", "{\"model_type\": 3}", "\u{0}", &"[".repeat(100_000)] {
        assert!(ModelConfig::parse(text).is_err());
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9]{0,8}".prop_map(Value::from),
        proptest::collection::vec(0u64..9, 0..4).prop_map(Value::from),
        Just(json!({"rope_type": "yarn", "factor": 1e-30, "rope_theta": 1e30})),
        Just(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 1})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
        let _ = ModelConfig::parse(&text);
    }

    /// Any values under any keys: what is accepted holds its invariants, and gives finite frequencies.
    #[test]
    fn whatever_is_accepted_is_sound(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any_value()), 1..4)
    ) {
        let mut config = config();
        let mut keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        keys.push("rope_parameters".to_owned());
        for (key, value) in changes {
            config[key.get(&keys).as_str()] = value;
        }
        if let Ok(accepted) = parse(&config) {
            prop_assert!(accepted.heads.is_multiple_of(accepted.kv_heads) && accepted.head_dim.is_multiple_of(2));
            prop_assert!(accepted.moe.top_k >= 1 && accepted.moe.top_k <= accepted.moe.experts);
            prop_assert!(!accepted.moe_layers().is_empty() && accepted.rms_eps > 0.0);
            let frequencies = accepted.rope.inv_freq(accepted.head_dim);
            prop_assert_eq!(frequencies.len(), accepted.head_dim / 2);
            prop_assert!(frequencies.iter().all(|f| !f.is_nan()), "{:?}: {:?}", accepted.rope, frequencies);
        }
    }
}
