//! Rotary frequencies and their scaling, as transformers' `modeling_rope_utils` computes them.
//!
//! Exponents and quotients are rounded to single precision where torch rounds them; powers are taken in double and
//! rounded once, so that every machine gets the same frequencies whatever its maths library.

use std::f64::consts::PI;

use crate::config::POSITION_MAX;
use crate::config::keys::Keys;
use crate::error::ModelError;

const YARN_BETA_FAST: f64 = 32.0;
const YARN_BETA_SLOW: f64 = 1.0;
const SUPPORTED: &str = "supported are default, linear, yarn and llama3";

/// Rotary embedding of all layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are stretched to longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched. All of these are static: the same at every length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a ramp between (YaRN).
    Yarn {
        /// The divisor.
        factor: f64,
        /// Context that the model was trained with before.
        original_max_position: usize,
        /// Rotations in that context from which on a frequency is kept.
        beta_fast: f64,
        /// Rotations under which it is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
    },
    /// Long wavelengths divided, short ones kept, smooth between (Llama 3.1).
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Context over this is the wavelength from which on a frequency is divided.
        low_freq_factor: f64,
        /// Context over this is the wavelength under which it is kept.
        high_freq_factor: f64,
        /// Context that the model was trained with before.
        original_max_position: usize,
    },
}

impl RopeConfig {
    /// One frequency for each pair of a head: `head_dim / 2` of them.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let pairs = head_dim / 2;
        let periods = (0..pairs).map(|i| self.theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32);
        match self.scaling {
            RopeScaling::None => periods.map(|p| 1.0 / p).collect(),
            RopeScaling::Linear { factor } => periods.map(|p| (1.0 / p) / factor as f32).collect(),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, .. } => {
                let dimension = |rotations: f64| {
                    let turns = original_max_position as f64 / (rotations * 2.0 * PI);
                    head_dim as f64 * turns.ln() / (2.0 * self.theta.ln())
                };
                let (low, high) = (dimension(beta_fast), dimension(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                let span = (if low == high { 0.001 } else { high - low }) as f32;
                let ramp = |i: usize| ((i as f32 - low as f32) / span).clamp(0.0, 1.0);
                let blend = |(i, p): (usize, f32)| {
                    let kept = 1.0 - ramp(i);
                    (1.0 / (factor as f32 * p)) * (1.0 - kept) + (1.0 / p) * kept
                };
                periods.enumerate().map(blend).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let context = original_max_position as f32;
                let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
                let stretch = |p: f32| {
                    let kept = 1.0 / p;
                    let wavelength = (2.0 * PI) as f32 / kept;
                    if wavelength > context / low {
                        kept / factor
                    } else if wavelength < context / high {
                        kept
                    } else {
                        let smooth = (context / wavelength - low) / (high - low);
                        (1.0 - smooth) * kept / factor + smooth * kept
                    }
                };
                periods.map(stretch).collect()
            }
        }
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// Out of `rope_theta` and `rope_scaling` (published style) or `rope_parameters` (transformers 5).
    pub(crate) fn from_keys(keys: &Keys<'_>, max_position: usize) -> Result<Self, ModelError> {
        let published = keys.object("rope_scaling", "rope_scaling.")?;
        let five = keys.object("rope_parameters", "rope_parameters.")?;
        if published.is_some() && five.is_some() {
            return Err(ModelError::Contradiction {
                first: "rope_scaling".to_owned(),
                second: "rope_parameters".to_owned(),
                reason: "only one of them can hold the scaling".to_owned(),
            });
        }
        let inner = match five {
            Some(five) => five.positive_or_none("rope_theta")?,
            None => None,
        };
        let theta = match (inner, keys.positive_or_none("rope_theta")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(ModelError::Contradiction {
                    first: "rope_parameters.rope_theta".to_owned(),
                    second: "rope_theta".to_owned(),
                    reason: format!("{a} and {b}"),
                });
            }
            (Some(theta), _) | (None, Some(theta)) => theta,
            (None, None) => return Err(keys.missing("rope_theta")),
        };
        if theta <= 1.0 {
            let (key, found) = ("rope_theta".to_owned(), theta.to_string());
            return Err(ModelError::BadKey { key, found, expected: "a number above 1".to_owned() });
        }
        let scaling = match published.or(five) {
            Some(keys) => scaling(&keys, max_position)?,
            None => RopeScaling::None,
        };
        Ok(Self { theta, scaling })
    }
}

fn scaling(keys: &Keys<'_>, max_position: usize) -> Result<RopeScaling, ModelError> {
    let unsupported = |key: &str, found: &str, remedy: &str| ModelError::Unsupported {
        key: keys.path(key),
        found: found.to_owned(),
        remedy: remedy.to_owned(),
    };
    if let Some(partial) = keys.positive_or_none("partial_rotary_factor")?.filter(|p| *p != 1.0) {
        let remedy = "these families rotate whole heads";
        return Err(unsupported("partial_rotary_factor", &partial.to_string(), remedy));
    }
    let kind = match (keys.text("rope_type")?, keys.text("type")?) {
        (Some(kind), _) | (None, Some(kind)) => kind,
        // As in transformers; but a factor without a kind is half of something.
        (None, None) if keys.get("factor").is_none() => "default",
        (None, None) => return Err(keys.missing("rope_type")),
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: keys.positive("factor")? }),
        "yarn" => yarn(keys, max_position),
        "llama3" => llama3(keys),
        "dynamic" => {
            let remedy = format!("its frequencies change with the length of each text; {SUPPORTED}");
            Err(unsupported("rope_type", kind, &remedy))
        }
        other => Err(unsupported("rope_type", other, SUPPORTED)),
    }
}

fn yarn(keys: &Keys<'_>, max_position: usize) -> Result<RopeScaling, ModelError> {
    let original = keys.count_or_none("original_max_position_embeddings", 1, POSITION_MAX)?;
    let original_max_position = original.unwrap_or(max_position);
    let factor = match keys.positive_or_none("factor")? {
        Some(factor) => factor,
        None if original.is_some() => max_position as f64 / original_max_position as f64,
        None => return Err(keys.missing("factor")),
    };
    let mscale = keys.positive_or_none("mscale")?.zip(keys.positive_or_none("mscale_all_dim")?);
    let attention_factor = match (keys.positive_or_none("attention_factor")?, mscale) {
        (Some(explicit), _) => explicit,
        (None, Some((mscale, all_dim))) => magnitude(factor, mscale) / magnitude(factor, all_dim),
        (None, None) => magnitude(factor, 1.0),
    };
    let beta_fast = keys.positive_or_none("beta_fast")?.unwrap_or(YARN_BETA_FAST);
    let beta_slow = keys.positive_or_none("beta_slow")?.unwrap_or(YARN_BETA_SLOW);
    if beta_fast < beta_slow {
        return Err(ModelError::Contradiction {
            first: keys.path("beta_fast"),
            second: keys.path("beta_slow"),
            reason: format!("{beta_fast} must not be under {beta_slow}"),
        });
    }
    let truncate = keys.flag("truncate", true)?;
    Ok(RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, attention_factor })
}

/// YaRN's growth of the attention's temperature with the stretch.
fn magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn llama3(keys: &Keys<'_>) -> Result<RopeScaling, ModelError> {
    let low_freq_factor = keys.positive("low_freq_factor")?;
    let high_freq_factor = keys.positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(ModelError::Contradiction {
            first: keys.path("high_freq_factor"),
            second: keys.path("low_freq_factor"),
            reason: format!("{high_freq_factor} must be above {low_freq_factor}"),
        });
    }
    Ok(RopeScaling::Llama3 {
        factor: keys.positive("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position: keys.count("original_max_position_embeddings", 1, POSITION_MAX)?,
    })
}
