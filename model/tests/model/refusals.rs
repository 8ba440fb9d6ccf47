//! Directories that must not be served, each refused with the error that says why.

use std::fs::{self, File};
use std::path::Path;

use mesh_model::{Checkpoint, ModelError};
use serde_json::{Value, json};

use crate::support::{INDEX, Model, SHARDS, Tensor, config_with};

fn refused(dir: &Path) -> ModelError {
    Checkpoint::open(dir).expect_err("the directory must be refused")
}

fn cut(file: &Path, by: u64) {
    let file = File::options().write(true).open(file).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - by).unwrap();
}

fn edit_index(dir: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let file = dir.join(INDEX);
    let mut index: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    edit(index["weight_map"].as_object_mut().unwrap());
    fs::write(file, index.to_string()).unwrap();
}

#[test]
fn a_truncated_file_names_itself_the_tensor_and_both_lengths() {
    let dir = Model::sound().write();
    let file = dir.path().join("model.safetensors");
    let whole = fs::metadata(&file).unwrap().len();
    cut(&file, 5);
    match refused(dir.path()) {
        ModelError::Truncated { file: named, what, expected, found } => {
            assert_eq!((named, expected, found), (file, whole, whole - 5));
            assert!(what.starts_with("tensor model."), "{what}");
        }
        other => panic!("{other}"),
    }
    let shards = Model::sound().write_sharded();
    cut(&shards.path().join(SHARDS[1]), 1);
    assert!(matches!(refused(shards.path()), ModelError::Truncated { file, .. } if file.ends_with(SHARDS[1])));
}

#[test]
fn files_of_nothing_or_of_anything_else_are_refused() {
    let dir = Model::sound().write();
    let file = dir.path().join("model.safetensors");
    fs::write(&file, "").unwrap();
    assert!(matches!(refused(dir.path()), ModelError::Truncated { expected: 8, found: 0, .. }));
    fs::write(&file, u64::MAX.to_le_bytes()).unwrap();
    assert!(matches!(refused(dir.path()), ModelError::BadHeader { .. }));
    fs::write(&file, "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert!(matches!(refused(dir.path()), ModelError::BadHeader { .. }));
    fs::remove_file(&file).unwrap();
    assert!(matches!(refused(dir.path()), ModelError::NoWeights { .. }));
    fs::create_dir(&file).unwrap();
    assert!(matches!(refused(dir.path()), ModelError::Io { .. }));
}

#[test]
fn a_missing_tensor_is_named_with_its_shape() {
    for name in ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.experts.2.down_proj.weight"] {
        let mut model = Model::sound();
        let shape = model.tensors.remove(name).unwrap().shape;
        match refused(model.write().path()) {
            ModelError::MissingTensor { tensor, expected } => assert_eq!((tensor.as_str(), expected), (name, shape)),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let mut model = Model::sound();
    model.tensor("model.layers.0.self_attn.q_proj.weight").shape = vec![12, 24];
    match refused(model.write().path()) {
        ModelError::WrongShape { tensor, expected, found, .. } => {
            assert_eq!(tensor, "model.layers.0.self_attn.q_proj.weight");
            assert_eq!((expected, found), (vec![24, 12], vec![12, 24]));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn tensors_that_nobody_asked_for_are_counted_and_the_first_named() {
    let mut model = Model::sound();
    for n in 0..6 {
        let extra = Tensor { dtype: "BF16", shape: vec![2], fill: 0 };
        model.tensors.insert(format!("model.layers.{n}.adapter.weight"), extra);
    }
    match refused(model.write().path()) {
        ModelError::ExtraTensors { count, first } => {
            assert_eq!((count, first.len()), (6, 4));
            assert_eq!(first[0], "model.layers.0.adapter.weight of model.safetensors");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_head_of_its_own_contradicts_tied_embeddings() {
    let mut model = Model::sound();
    model.config["tie_word_embeddings"] = json!(true);
    let refusal = refused(model.write().path());
    assert!(matches!(&refusal, ModelError::ExtraTensors { first, .. } if first[0].starts_with("lm_head")), "{refusal}");
}

#[test]
fn types_that_are_not_read_are_named() {
    for dtype in ["F16", "I16"] {
        let mut model = Model::sound();
        model.tensor("model.embed_tokens.weight").dtype = dtype;
        let refusal = refused(model.write().path());
        assert!(matches!(&refusal, ModelError::WrongDtype { found, .. } if found == dtype), "{refusal}");
    }
}

#[test]
fn a_config_that_contradicts_the_weights_is_refused() {
    let cases = [
        (json!({"vocab_size": 11}), "shape"),
        (json!({"num_experts": 4}), "missing"),
        (json!({"num_experts": 2}), "extra"),
        (json!({"num_hidden_layers": 3}), "missing"),
        (json!({"num_hidden_layers": 2, "mlp_only_layers": []}), "missing"),
        (json!({"num_key_value_heads": 4}), "shape"),
        (json!({"head_dim": 8}), "shape"),
        (json!({"moe_intermediate_size": 9}), "shape"),
        (json!({"attention_bias": true}), "missing"),
    ];
    for (change, kind) in cases {
        let mut model = Model::sound();
        model.config = config_with(change.clone());
        let refusal = refused(model.write().path());
        // The gate's shape is compared before the experts are counted.
        let expected = match kind {
            "shape" => matches!(refusal, ModelError::WrongShape { .. }),
            "missing" => matches!(refusal, ModelError::MissingTensor { .. } | ModelError::WrongShape { .. }),
            _ => matches!(refusal, ModelError::ExtraTensors { .. } | ModelError::WrongShape { .. }),
        };
        assert!(expected, "{change}: {refusal}");
    }
}

#[test]
fn an_enormous_config_over_small_weights_is_refused_at_once() {
    let mut model = Model::sound();
    model.config = config_with(json!({"num_hidden_layers": 1024, "num_experts": 4096, "mlp_only_layers": []}));
    assert!(matches!(refused(model.write().path()), ModelError::MissingTensor { .. } | ModelError::WrongShape { .. }));
}

#[test]
fn an_index_and_its_shards_must_agree() {
    let sharded = || Model::sound().write_sharded();
    let first = |map: &serde_json::Map<String, Value>| map.keys().next().unwrap().clone();

    let dir = sharded();
    fs::remove_file(dir.path().join(SHARDS[1])).unwrap();
    let refusal = refused(dir.path());
    assert!(matches!(&refusal, ModelError::MissingShard { file, .. } if file.ends_with(SHARDS[1])), "{refusal}");

    let contradicted = |edit: &dyn Fn(&mut serde_json::Map<String, Value>), says: &str| {
        let dir = sharded();
        edit_index(dir.path(), edit);
        let refusal = refused(dir.path());
        assert!(matches!(refusal, ModelError::IndexContradiction { .. }), "{refusal}");
        assert!(refusal.to_string().contains(says), "{refusal}");
    };
    contradicted(&|map| drop(map.insert("model.nowhere".into(), json!(SHARDS[0]))), "does not hold it");
    contradicted(&|map| drop(map.insert(first(map), json!(SHARDS[1]))), "which the index places in");
    contradicted(&|map| drop(map.remove(&first(map))), "does not name");
    contradicted(&|map| drop(map.insert(first(map), json!("../elsewhere.safetensors"))), "plain file name");
    contradicted(&|map| map.clear(), "0 shards");

    let dir = sharded();
    fs::write(dir.path().join(INDEX), "{\"weight_map\": [").unwrap();
    assert!(matches!(refused(dir.path()), ModelError::BadJson { .. }));
}

#[test]
fn a_directory_without_a_config_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = refused(dir.path());
    assert!(matches!(&refusal, ModelError::Io { file, .. } if file.ends_with("config.json")), "{refusal}");
    fs::write(dir.path().join("config.json"), vec![b' '; (1 << 20) + 1]).unwrap();
    assert!(matches!(refused(dir.path()), ModelError::TooLarge { .. }));
}
