//! Rotary frequencies against numbers worked out apart, in double precision, from the formulas of transformers.

use mesh_model::{RopeConfig, RopeScaling};

fn close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().map(|f| f64::from(*f)).zip(expected) {
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
        2.635_603_15e-1,
        4.445_698_53e-2,
        1.874_735_52e-2,
        7.905_694_15e-3,
        3.333_803_58e-3,
        1.405_853_31e-3,
        5.928_434_26e-4,
        2.5e-4,
        1.054_241_26e-4,
        4.445_698_53e-5,
        1.874_735_52e-5,
        7.905_694_15e-6,
        3.333_803_58e-6,
        1.405_853_31e-6,
        5.928_434_26e-7,
    ];
    close(&fixture.inv_freq(32), &expected);
    assert!((fixture.attention_factor() - 1.138_629_4).abs() < 1e-6);

    let real = yarn(1e6, 4.0, 32768, true).inv_freq(128);
    let expected = [
        1.333_521_43e-2,
        8.659_643_23e-3,
        5.375_321_49e-3,
        3.168_422_57e-3,
        1.848_276_56e-3,
        1.064_360_98e-3,
        6.029_411_76e-4,
        3.342_405_46e-4,
        1.798_411_56e-4,
        9.262_301_70e-5,
        4.445_698_53e-5,
        2.886_954_96e-5,
    ];
    close(&some(&real, 20, 44), &expected);

    let unrounded = yarn(150_000.0, 32.0, 4096, false).inv_freq(64);
    let expected = [
        1.070_244_21e-1,
        5.081_327_48e-2,
        1.933_500_11e-2,
        6.794_959_49e-3,
        2.093_792_38e-3,
        4.564_839_19e-4,
        3.830_881_24e-5,
        1.818_833_67e-5,
    ];
    close(&some(&unrounded, 6, 22), &expected);
}

#[test]
fn llama3_is_smooth_between_its_two_wavelengths() {
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 };
    let frequencies = RopeConfig { theta: 500_000.0, scaling }.inv_freq(128);
    let expected = [
        7.292_664_74e-3,
        4.839_421_35e-3,
        3.211_445_99e-3,
        1.371_893_57e-3,
        5.248_461_61e-4,
        1.785_078_13e-4,
        7.784_655_27e-5,
        5.165_906_87e-5,
        3.428_102_20e-5,
        2.274_892_86e-5,
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
