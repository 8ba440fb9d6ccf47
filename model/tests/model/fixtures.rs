//! Real directories, and written ones of every shape, open and give the right tensors.

use mesh_core::{ExpertId, LayerId};
use mesh_model::{Checkpoint, Family, LayerKind, ModelConfig, QkNorm, WeightDtype, to_f32};
use serde_json::json;

use crate::support::{Model, config_with, fixture, models};

#[test]
fn every_fixture_opens_and_each_tensor_is_the_one_that_the_reference_reader_finds() {
    for dir in models() {
        let checkpoint = Checkpoint::open(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
        files.retain(|f| f.file_name().unwrap().to_string_lossy().starts_with("model"));
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
        let (mut seen, mut total) = (0, 0);
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            for (name, expected) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
                let found = checkpoint.tensor(name).unwrap();
                assert_eq!((found.shape, found.bytes), (expected.shape(), expected.data()), "{name}");
                seen += 1;
                total += found.bytes.len() as u64;
            }
        }
        let config = checkpoint.config();
        let experts = (config.moe_layers().len() * config.moe.experts) as u64;
        assert!(seen > 0);
        assert_eq!(checkpoint.trunk_bytes() + experts * checkpoint.expert_bytes(), total, "{}", dir.display());
        assert_eq!(checkpoint.name(), dir.file_name().unwrap().to_string_lossy());
    }
}

#[test]
fn the_shipped_models_are_what_their_recipes_say() {
    let tiny = Checkpoint::open(fixture("tiny-moe")).unwrap();
    let config = tiny.config();
    assert_eq!((config.family, config.hidden, config.layers.len()), (Family::Qwen3Moe, 192, 4));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (6, 2, 32));
    assert_eq!((config.moe.experts, config.moe.top_k, config.moe.intermediate), (8, 2, 256));
    assert!(config.gate.normalise && config.tied_embeddings && config.eos == [0]);
    assert_eq!(config.weight_dtype, WeightDtype::Bf16);
    assert_eq!(tiny.head().unwrap(), tiny.embedding().unwrap());
    assert_eq!(tiny.expert_bytes(), 3 * 192 * 256 * 2);

    let mixtral = ModelConfig::from_dir(fixture("checkpoints/mixtral-swa-f32")).unwrap();
    assert_eq!((mixtral.family, mixtral.qk_norm), (Family::Mixtral, QkNorm::None));
    assert_eq!((mixtral.sliding_window, mixtral.weight_dtype), (Some(24), WeightDtype::F32));
    assert_eq!((mixtral.head_dim, mixtral.bos, mixtral.rms_eps), (16, Some(1), 1e-5));

    let olmoe = ModelConfig::from_dir(fixture("checkpoints/olmoe-clip-gqa-f32")).unwrap();
    assert_eq!((olmoe.family, olmoe.qk_norm, olmoe.clip_qkv), (Family::Olmoe, QkNorm::Whole, Some(1.25)));
    assert!(!olmoe.gate.normalise);
}

#[test]
fn each_role_of_a_layer_has_its_tensors_and_no_other() {
    let model = Model::of(config_with(json!({"attention_bias": true})));
    let dir = model.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let attention = checkpoint.attention(LayerId(1)).unwrap();
    assert_eq!(
        (attention.q.shape, attention.k.shape, attention.o.shape),
        (&[24, 12][..], &[12, 12][..], &[12, 24][..])
    );
    assert_eq!(attention.o_bias.unwrap().shape, [12]);
    assert_eq!(attention.q_norm.unwrap().shape, [6]);
    assert_eq!(checkpoint.dense(LayerId(0)).unwrap().down.shape, [12, 20]);
    let expert = checkpoint.expert(LayerId(1), ExpertId(2)).unwrap();
    assert_eq!(expert.gate.name, "model.layers.1.mlp.experts.2.gate_proj.weight");
    assert_eq!(checkpoint.gate(LayerId(1)).unwrap().matrix().unwrap(), (3, 12));
    assert_eq!(to_f32(checkpoint.post_norm(LayerId(0)).unwrap()).len(), 12);
    assert!(checkpoint.expert(LayerId(0), ExpertId(0)).is_err(), "a dense layer has no experts");
    assert!(checkpoint.expert(LayerId(1), ExpertId(3)).is_err());
    assert!(checkpoint.dense(LayerId(1)).is_err() && checkpoint.gate(LayerId(0)).is_err());
    assert!(checkpoint.attention(LayerId(2)).is_err() && checkpoint.post_norm(LayerId(2)).is_err());
    assert_eq!(checkpoint.config().layers, [LayerKind::Dense, LayerKind::Moe]);
    assert_eq!(checkpoint.config().moe_layers(), [LayerId(1)]);
}

#[test]
fn mixtrals_gate_up_and_down_are_w1_w3_and_w2() {
    let checkpoint = Checkpoint::open(fixture("checkpoints/mixtral-swa-f32")).unwrap();
    let expert = checkpoint.expert(LayerId(1), ExpertId(7)).unwrap();
    let name = |w: &str| format!("model.layers.1.block_sparse_moe.experts.7.{w}.weight");
    assert_eq!([expert.gate.name, expert.up.name, expert.down.name], [name("w1"), name("w3"), name("w2")]);
}

#[test]
fn shards_give_the_same_tensors_as_one_file() {
    let model = Model::sound();
    let (one, two) = (model.write(), model.write_sharded());
    let (one, two) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(two.path()).unwrap());
    for name in model.tensors.keys() {
        assert_eq!(one.tensor(name).unwrap(), two.tensor(name).unwrap());
    }
    assert_eq!((one.trunk_bytes(), one.expert_bytes()), (two.trunk_bytes(), two.expert_bytes()));
}

#[test]
fn the_digest_follows_the_weights_and_the_config_and_nothing_else() {
    let digest = |model: &Model| Checkpoint::open(model.write().path()).unwrap().digest();
    let model = Model::sound();
    let same = digest(&model);
    assert_eq!(same, digest(&model), "another directory, the same model");
    let mut tuned = Model::sound();
    tuned.tensor("model.norm.weight").fill ^= 1;
    assert_ne!(same, digest(&tuned));
    assert_ne!(same, digest(&Model::of(config_with(json!({"rope_theta": 20000.0})))));
    let spelled_otherwise = json!({"num_experts": "(absent)", "num_local_experts": 3, "torch_dtype": "(absent)",
        "dtype": "bfloat16", "rope_theta": "(absent)", "rope_scaling": "(absent)",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}});
    assert_eq!(same, digest(&Model::of(config_with(spelled_otherwise))));
}

#[test]
fn released_pages_are_read_again() {
    let checkpoint = Checkpoint::open(fixture("tiny-moe")).unwrap();
    let expert = checkpoint.expert(LayerId(2), ExpertId(5)).unwrap().up;
    checkpoint.prefetch(expert);
    let before = expert.bytes.to_vec();
    checkpoint.release(expert);
    assert_eq!(expert.bytes, before);
}

#[test]
fn leftovers_of_old_exports_are_tolerated() {
    let mut model = Model::sound();
    let leftover = crate::support::Tensor { dtype: "F32", shape: vec![3], fill: 0 };
    model.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), leftover);
    assert!(Checkpoint::open(model.write().path()).is_ok());
}
