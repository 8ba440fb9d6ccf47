//! Rotary frequencies against numbers worked out apart, in double precision, from the formulas of transformers.

use mesh_model::{RopeConfig, RopeScaling};

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{found} is not {expected}");
    }
}

fn some(frequencies: &[f32], from: usize, to: usize) -> Vec<f32> {
    frequencies[from..to].iter().step_by(2).copied().collect()
}

fn yarn(theta: f64, factor: f64, original_max_position: usize, truncate: bool) -> RopeConfig {
    let attention_factor = 0.1 * factor.ln() + 1.0;
    let (beta_fast, beta_slow) = (32.0, 1.0);
    let scaling = RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, attention_factor };
    RopeConfig { theta, scaling }
}

#[test]
fn plain_and_linear() {
    let plain = RopeConfig { theta: 1e4, scaling: RopeScaling::None };
    close(&plain.inv_freq(8), &[1.0, 0.1, 0.01, 0.001]);
    let linear = RopeConfig { theta: 1e4, scaling: RopeScaling::Linear { factor: 4.0 } };
    close(&linear.inv_freq(8), &[0.25, 0.025, 0.0025, 0.00025]);
    assert_eq!((plain.attention_factor(), linear.attention_factor()), (1.0, 1.0));
}

#[test]
fn yarn_keeps_what_turns_fast_and_divides_what_turns_slowly() {
    let fixture = yarn(1e6, 4.0, 32, true);
    let expected = [
        1.0,
        2.63560315e-1,
        4.44569853e-2,
        1.87473552e-2,
        7.90569415e-3,
        3.33380358e-3,
        1.40585331e-3,
        5.92843426e-4,
        2.5e-4,
        1.05424126e-4,
        4.44569853e-5,
        1.87473552e-5,
        7.90569415e-6,
        3.33380358e-6,
        1.40585331e-6,
        5.92843426e-7,
    ];
    close(&fixture.inv_freq(32), &expected);
    assert!((fixture.attention_factor() - 1.138_629_4).abs() < 1e-6);

    let real = yarn(1e6, 4.0, 32768, true).inv_freq(128);
    let expected = [
        1.33352143e-2,
        8.65964323e-3,
        5.37532149e-3,
        3.16842257e-3,
        1.84827656e-3,
        1.06436098e-3,
        6.02941176e-4,
        3.34240546e-4,
        1.79841156e-4,
        9.26230170e-5,
        4.44569853e-5,
        2.88695496e-5,
    ];
    close(&some(&real, 20, 44), &expected);

    let unrounded = yarn(150_000.0, 32.0, 4096, false).inv_freq(64);
    let expected = [
        1.07024421e-1,
        5.08132748e-2,
        1.93350011e-2,
        6.79495949e-3,
        2.09379238e-3,
        4.56483919e-4,
        3.83088124e-5,
        1.81883367e-5,
    ];
    close(&some(&unrounded, 6, 22), &expected);
}

#[test]
fn llama3_is_smooth_between_its_two_wavelengths() {
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 };
    let frequencies = RopeConfig { theta: 500_000.0, scaling }.inv_freq(128);
    let expected = [
        7.29266474e-3,
        4.83942135e-3,
        3.21144599e-3,
        1.37189357e-3,
        5.24846161e-4,
        1.78507813e-4,
        7.78465527e-5,
        5.16590687e-5,
        3.42810220e-5,
        2.27489286e-5,
    ];
    close(&some(&frequencies, 24, 44), &expected);
}

#[test]
fn yarns_temperature_is_explicit_or_a_quotient_or_the_papers() {
    let factor = |extra: &str| {
        let mut config = crate::support::config();
        let scaling =
            format!(r#"{{"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16{extra}}}"#);
        config["rope_scaling"] = serde_json::from_str(&scaling).unwrap();
        mesh_model::ModelConfig::parse(&config.to_string()).unwrap().rope.attention_factor()
    };
    close(&[factor("")], &[1.368_887_9]);
    close(&[factor(r#", "attention_factor": 1.25, "mscale": 0.5, "mscale_all_dim": 1.0"#)], &[1.25]);
    close(&[factor(r#", "mscale": 0.707, "mscale_all_dim": 1.0"#)], &[0.921_042_36]);
    close(&[factor(r#", "mscale": 0.707"#)], &[1.368_887_9]);
}
