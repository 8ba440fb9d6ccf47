//! The rule to say aloud: core knows nothing, the data plane does not know gRPC, the control plane does not know the
//! kernels, the services only assemble.

use std::collections::{BTreeMap, BTreeSet};

use integration_tests::fixture::repository;
use serde_json::Value;

/// Each package's normal and build dependencies by name; those of tests are free.
fn direct() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = std::process::Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--no-deps", "--offline"]).current_dir(repository());
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages").iter();
    packages
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies").iter();
            let normal = dependencies.filter(|d| d["kind"] != "dev").map(|d| name(&d["name"]));
            (name(&package["name"]), normal.collect())
        })
        .collect()
}

fn name(value: &Value) -> String {
    value.as_str().expect("a name").to_owned()
}

/// All workspace packages that `package` reaches, and every direct dependency that they name.
fn reach(all: &BTreeMap<String, BTreeSet<String>>, package: &str) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut next = vec![package.to_owned()];
    while let Some(package) = next.pop() {
        for dependency in all.get(&package).into_iter().flatten() {
            if reached.insert(dependency.clone()) {
                next.push(dependency.clone());
            }
        }
    }
    reached
}

#[test]
fn nobody_knows_more_than_the_rule_allows() {
    let all = direct();
    let ours: BTreeSet<&str> = all.keys().map(String::as_str).collect();
    let allowed: [(&str, &[&str]); 10] = [
        ("mesh-core", &[]),
        ("mesh-kernels", &[]),
        ("ucx-sys", &[]),
        ("mesh-transport", &["mesh-core", "ucx-sys"]),
        ("mesh-model", &["mesh-core"]),
        ("mesh-proto", &["mesh-core"]),
        ("mesh-service", &["mesh-core", "mesh-proto"]),
        ("router-svc", &["mesh-core", "mesh-proto", "mesh-service"]),
        ("meshctl", &["mesh-core", "mesh-proto", "mesh-service", "mesh-model"]),
        ("mesh-bench", &["mesh-core", "mesh-transport", "ucx-sys", "mesh-kernels", "mesh-model"]),
    ];
    for (package, allowed) in allowed {
        assert!(all.contains_key(package), "{package} is not in the workspace");
        let reached = reach(&all, package);
        let known: Vec<&String> = reached.iter().filter(|d| ours.contains(d.as_str())).collect();
        let beyond: Vec<_> = known.iter().filter(|d| !allowed.contains(&d.as_str())).collect();
        assert!(beyond.is_empty(), "{package} knows {beyond:?}, the rule allows {allowed:?}");
    }
}

#[test]
fn core_has_no_io_and_the_data_plane_no_grpc() {
    let all = direct();
    let foreign: [(&str, &[&str]); 5] = [
        ("mesh-core", &["tokio", "tonic", "prost", "libc", "rayon", "tracing"]),
        ("mesh-transport", &["tonic", "prost", "tokio"]),
        ("mesh-kernels", &["tonic", "prost", "tokio"]),
        ("mesh-model", &["tonic", "prost", "tokio"]),
        ("router-svc", &["libloading", "memmap2", "safetensors", "tokenizers", "rayon", "cudarc"]),
    ];
    for (package, foreign) in foreign {
        let reached = reach(&all, package);
        let known: Vec<_> = foreign.iter().filter(|d| reached.contains(**d)).collect();
        assert!(known.is_empty(), "{package} reaches {known:?}");
    }
}

#[test]
fn services_do_not_know_each_other_and_only_local_mesh_knows_them() {
    let all = direct();
    let services = ["router-svc", "attention-svc", "expert-svc"];
    for (package, dependencies) in &all {
        let known: Vec<_> = services.iter().filter(|s| dependencies.contains(**s)).collect();
        let may = package == "local-mesh" || known.is_empty();
        assert!(may, "{package} knows the services {known:?}: only local-mesh assembles them");
    }
}
