//! Whole meshes, measured in turns: prefill as a share of the machine's arithmetic, decode as a share of what its memory
//! and its arithmetic allow, and what each transport costs beside the same nodes in one process.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use mesh_kernels::Dtype;
use mesh_kernels::cpu::CpuOptions;
use mesh_model::{Checkpoint, ModelConfig};
use mesh_transport::TransportKind;
use serde::Serialize;

use crate::about::{JsonArg, Machine, memory, processors};
use crate::cost;
use crate::error::BenchError;
use crate::limits::{Limits, Probe};
use crate::meshes::{self, Load, MeshShape, Meshes, median};

/// Bytes of an element of the meshes' dtype.
const ELEMENT_BYTES: usize = 2;

/// `mesh-bench mesh`.
#[derive(Clone, Debug, Args)]
pub struct MeshArgs {
    /// A checkpoint, as `mesh-bench model` makes one.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Meshes: attention nodes, expert nodes, transport.
    #[arg(
        long,
        value_name = "SHAPE",
        value_delimiter = ',',
        default_value = "1A1E:local,1A2E:local,1A2E:ucx,1A2E:tcp,1A4E:local"
    )]
    pub shapes: Vec<MeshShape>,
    /// Prompts of one stream, tokens.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "128,512,2048")]
    pub prefill: Vec<usize>,
    /// Streams that decode together.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,32,64")]
    pub streams: Vec<usize>,
    /// Prompt tokens of each decoding stream.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub prompt: usize,
    /// Steps of each decoding stream.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub steps: usize,
    /// Rounds, each of which visits every shape; one more comes first and is not counted.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub rounds: u16,
    /// Compute threads of each node; by default each group of nodes shares out all processors among its own.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Where meshctl and the services are; beside this program when absent.
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Where the results go.
    #[command(flatten)]
    pub json: JsonArg,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "what", content = "size")]
pub enum Work {
    /// A prompt of so many tokens, one stream.
    Prefill(usize),
    /// So many streams that decode together.
    Decode(usize),
}

impl Work {
    fn words(self) -> String {
        match self {
            Work::Prefill(tokens) => format!("prefill of {tokens}"),
            Work::Decode(streams) => format!("decode of {streams}"),
        }
    }
}

/// What bounds a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// The machine's arithmetic.
    Arithmetic,
    /// Its streaming read.
    Read,
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The model's folder.
    pub model: PathBuf,
    /// Of weights and activations.
    pub dtype: &'static str,
    /// Rounds that count.
    pub rounds: u16,
    /// Compute threads of each node, where they were given.
    pub threads: Option<u16>,
    /// Prompt tokens and steps of each decoding stream.
    pub decode: [usize; 2],
    /// With all processors, the best that was measured before any figure.
    pub limits: Limits,
    /// Where the number of distinct experts in the limits of decode comes from.
    pub distinct_experts: &'static str,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// Transports beside the same nodes in one process.
    pub ratios: Vec<Ratio>,
    /// What was not measured, and why.
    pub left_out: Vec<String>,
}

/// One figure beside its limit.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// What.
    #[serde(flatten)]
    pub work: Work,
    /// Of which mesh.
    pub shape: String,
    /// Median over the rounds.
    pub tokens_per_s: f64,
    /// Each round.
    pub each: Vec<f64>,
    /// What the machine allows, measured just before each round: others may share its memory. The median.
    pub limit_tokens_per_s: f64,
    /// By what, mostly.
    pub bound: Bound,
    /// Each round's share of its own limit.
    pub shares: Vec<f64>,
    /// The median of those.
    pub share: f64,
}

/// A mesh's tokens a second over those of the same nodes in one process.
#[derive(Debug, Serialize)]
pub struct Ratio {
    /// What.
    #[serde(flatten)]
    pub work: Work,
    /// Which mesh.
    pub shape: String,
    /// Which other one.
    pub base: String,
    /// Over it.
    pub ratio: f64,
}

/// Runs it all.
///
/// # Errors
/// The model cannot be read or does not fit, a mesh fails, or Ctrl-C came; nothing is left running in any case.
pub fn run(args: &MeshArgs) -> Result<Report, BenchError> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let config = checkpoint.config();
    let mut left_out = Vec::new();
    let mut shapes = shapes_here(&args.shapes, &mut left_out)?;
    keep_what_fits(&mut shapes, mesh_bytes(&checkpoint), memory("MemAvailable"), &mut left_out)?;
    let works = works(args, config, &mut left_out);
    left_out.iter().for_each(|line| eprintln!("LEFT OUT: {line}"));
    let probe = Probe::new(CpuOptions { dtype: Dtype::Bf16, threads: processors(), isa: None, bind_from: None })?;

    let (limits, each) = meshes::with_meshes(args.bin_dir.as_deref(), async |meshes: &mut Meshes| {
        for shape in &shapes {
            eprintln!("starting {shape}");
            meshes.start(&args.model, *shape, args.threads).await?;
        }
        rounds(args, meshes, shapes.len(), &works, &probe).await
    })?;
    let mut figures = Vec::new();
    for (work, of_work) in works.iter().zip(each) {
        for (shape, each) in shapes.iter().zip(of_work) {
            figures.push(figure(*work, *shape, &each, config));
        }
    }
    Ok(Report {
        model: args.model.clone(),
        dtype: meshes::DTYPE,
        rounds: args.rounds,
        threads: args.threads,
        decode: [args.prompt, args.steps],
        limits,
        distinct_experts: "expected, when each token's experts are drawn evenly and independently",
        ratios: ratios(&shapes, &figures),
        figures,
        left_out,
    })
}

/// The shapes that this machine can run; why not the others.
fn shapes_here(asked: &[MeshShape], left_out: &mut Vec<String>) -> Result<Vec<MeshShape>, BenchError> {
    let mut shapes = Vec::new();
    for shape in asked {
        match meshes::unavailable(shape.transport)? {
            None => shapes.push(*shape),
            Some(why) => left_out.push(format!("{shape}: {why}")),
        }
    }
    Ok(shapes)
}

/// What fits into the model's context.
fn works(args: &MeshArgs, config: &ModelConfig, left_out: &mut Vec<String>) -> Vec<Work> {
    let prefill = args.prefill.iter().map(|tokens| (Work::Prefill(*tokens), tokens + 1));
    let decode = args.streams.iter().map(|streams| (Work::Decode(*streams), args.prompt + args.steps + 1));
    let (fit, not): (Vec<_>, Vec<_>) = prefill.chain(decode).partition(|(_, context)| *context <= config.max_position);
    let positions = config.max_position;
    left_out.extend(not.iter().map(|(work, _)| format!("{}: the model has {positions} positions", work.words())));
    fit.into_iter().map(|(work, _)| work).collect()
}

/// Memory of a mesh: all weights, and a tenth for what its nodes need beside them.
fn mesh_bytes(checkpoint: &Checkpoint) -> u64 {
    let config = checkpoint.config();
    let experts = (config.moe.experts * config.moe_layers().len()) as u64 * checkpoint.expert_bytes();
    (checkpoint.trunk_bytes() + experts) / 10 * 11
}

/// All meshes run at once: drops the last ones, as many as memory does not hold.
fn keep_what_fits(
    shapes: &mut Vec<MeshShape>,
    each: u64,
    available: Option<u64>,
    left_out: &mut Vec<String>,
) -> Result<(), BenchError> {
    let Some(available) = available else { return Ok(()) };
    let (needed_mib, available_mib) = (each >> 20, available >> 20);
    let fit = (available / each.max(1)) as usize;
    if fit == 0 {
        return Err(BenchError::Memory { needed_mib, available_mib });
    }
    for shape in shapes.split_off(fit.min(shapes.len())) {
        left_out.push(format!(
            "{shape}: all meshes run at once, each in {needed_mib} MiB, and {available_mib} MiB are free"
        ));
    }
    Ok(())
}

/// What the machine allowed just before, and tokens a second.
type Measured = (Limits, f64);
/// By work, mesh and round, without the warm-up.
type Each = Vec<Vec<Vec<Measured>>>;

async fn rounds(
    args: &MeshArgs,
    meshes: &Meshes,
    shapes: usize,
    works: &[Work],
    probe: &Probe,
) -> Result<(Limits, Each), BenchError> {
    let mut best = probe.limits();
    let mut each = vec![vec![Vec::new(); shapes]; works.len()];
    for round in 0..=args.rounds {
        for (work, of_work) in works.iter().zip(&mut each) {
            for (mesh, of_mesh) in of_work.iter_mut().enumerate() {
                let limits = probe.limits();
                best = best.or_better(limits);
                let rate = tokens_per_s(args, meshes, mesh, *work, round).await?;
                if round > 0 {
                    of_mesh.push((limits, rate));
                }
            }
        }
        eprintln!("round {round} of {} done{}", args.rounds, if round == 0 { " (warm-up)" } else { "" });
    }
    Ok((best, each))
}

async fn tokens_per_s(
    args: &MeshArgs,
    meshes: &Meshes,
    mesh: usize,
    work: Work,
    round: u16,
) -> Result<f64, BenchError> {
    let seed = usize::from(round);
    Ok(match work {
        Work::Prefill(tokens) => tokens as f64 / meshes.prefill_ms(mesh, tokens, seed).await? * 1e3,
        Work::Decode(streams) => {
            let load = Load { streams, prompt: args.prompt, tokens: args.steps + 1, seed };
            streams as f64 / meshes.step_ms(mesh, load).await? * 1e3
        }
    })
}

/// The most tokens a second that the machine allows, and by what: reading and arithmetic may go on at the same time, so the
/// slower of them bounds.
fn limit(work: Work, config: &ModelConfig, limits: Limits) -> (f64, Bound) {
    let (tokens, flops) = match work {
        Work::Prefill(tokens) => (tokens, cost::prefill_flops(config, tokens)),
        Work::Decode(streams) => (streams, streams as f64 * cost::prefill_flops(config, 1)),
    };
    let arithmetic_s = flops / (limits.gflops * 1e9);
    let read_s = cost::step_bytes(config, tokens, ELEMENT_BYTES) / (limits.gbytes * 1e9);
    let bound = if arithmetic_s > read_s { Bound::Arithmetic } else { Bound::Read };
    (tokens as f64 / arithmetic_s.max(read_s), bound)
}

fn figure(work: Work, shape: MeshShape, measured: &[Measured], config: &ModelConfig) -> Figure {
    let (limits, bounds): (Vec<f64>, Vec<Bound>) = measured.iter().map(|(at, _)| limit(work, config, *at)).unzip();
    let each: Vec<f64> = measured.iter().map(|(_, rate)| *rate).collect();
    let shares: Vec<f64> = each.iter().zip(&limits).map(|(rate, limit)| rate / limit).collect();
    let by_reading = bounds.iter().filter(|bound| **bound == Bound::Read).count();
    Figure {
        work,
        shape: shape.to_string(),
        tokens_per_s: median(&each),
        limit_tokens_per_s: median(&limits),
        bound: if 2 * by_reading > bounds.len() { Bound::Read } else { Bound::Arithmetic },
        share: median(&shares),
        each,
        shares,
    }
}

fn ratios(shapes: &[MeshShape], figures: &[Figure]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for shape in shapes.iter().filter(|shape| shape.transport != TransportKind::Local) {
        let (shape, base) = (shape.to_string(), shape.in_one_process().to_string());
        for figure in figures.iter().filter(|figure| figure.shape == shape) {
            let of_base = figures.iter().find(|other| other.shape == base && other.work == figure.work);
            let ratio = of_base.map(|of_base| figure.tokens_per_s / of_base.tokens_per_s);
            ratios.extend(ratio.map(|ratio| Ratio {
                work: figure.work,
                shape: shape.clone(),
                base: base.clone(),
                ratio,
            }));
        }
    }
    ratios
}

impl Report {
    /// As text.
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let Limits { threads, gflops, gbytes } = self.limits;
        let _ = writeln!(
            text,
            "{}\nlimits, {threads} threads, {}, at best: {gflops:.1} GFLOP/s from registers, {gbytes:.1} GB/s streaming read\n\
             distinct experts of a step: {}\n\n\
             tokens/s (limit just before by arithmetic a, by reading the weights r; share of it), medians of {} rounds",
            Machine::here().words(),
            self.dtype,
            self.distinct_experts,
            self.rounds
        );
        let mut works: Vec<Work> = self.figures.iter().map(|figure| figure.work).collect();
        works.dedup();
        let of = |work: Work| self.figures.iter().filter(move |figure| figure.work == work);
        let _ = write!(text, "{:<16}", "");
        works.first().into_iter().flat_map(|work| of(*work)).for_each(|figure| {
            let _ = write!(text, " {:>25}", figure.shape);
        });
        text.push('\n');
        for work in works {
            let _ = write!(text, "{:<16}", work.words());
            for figure in of(work) {
                let by = if figure.bound == Bound::Read { 'r' } else { 'a' };
                let (rate, limit, share) = (figure.tokens_per_s, figure.limit_tokens_per_s, 100.0 * figure.share);
                let _ = write!(text, " {rate:>9.1} ({limit:>6.0} {by} {share:>3.0}%)");
            }
            text.push('\n');
        }
        for ratio in &self.ratios {
            let _ = writeln!(text, "{} / {}, {}: {:.2}", ratio.shape, ratio.base, ratio.work.words(), ratio.ratio);
        }
        self.left_out.iter().for_each(|line| text.push_str(&format!("LEFT OUT: {line}\n")));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        args: MeshArgs,
    }

    fn parse(flags: &[&str]) -> Result<MeshArgs, clap::Error> {
        Flags::try_parse_from(["x", "--model", "m"].iter().chain(flags)).map(|flags| flags.args)
    }

    fn config(max_position: usize) -> ModelConfig {
        let mut shape = crate::growth::tiny();
        shape.max_position = max_position;
        shape.config().unwrap()
    }

    #[test]
    fn shapes_and_sizes_are_comma_lists() {
        let args = parse(&["--shapes", "1A1E:local,2A4E:tcp", "--streams", "3", "--prefill", "5,6"]).unwrap();
        assert_eq!(args.shapes.iter().map(MeshShape::to_string).collect::<Vec<_>>(), ["1A1E:local", "2A4E:tcp"]);
        assert_eq!((args.streams, args.prefill), (vec![3], vec![5, 6]));
        assert_eq!(parse(&[]).unwrap().shapes.len(), 5);
        assert!(parse(&["--shapes", "1A1E"]).is_err() && parse(&["--rounds", "0"]).is_err());
    }

    #[test]
    fn what_does_not_fit_into_the_context_is_left_out_aloud() {
        let mut left_out = Vec::new();
        let works = works(&parse(&["--prefill", "63,64", "--streams", "2"]).unwrap(), &config(64), &mut left_out);
        assert_eq!(works, [Work::Prefill(63), Work::Decode(2)]);
        assert!(left_out[0].contains("prefill of 64"), "{left_out:?}");
    }

    #[test]
    fn meshes_that_memory_does_not_hold_are_left_out_aloud() {
        let (mut shapes, mut left_out) = (parse(&[]).unwrap().shapes, Vec::new());
        keep_what_fits(&mut shapes, 3 << 30, Some(10 << 30), &mut left_out).unwrap();
        assert_eq!((shapes.len(), left_out.len()), (3, 2));
        assert!(left_out[0].contains("1A2E:tcp"), "{left_out:?}");
        let error = keep_what_fits(&mut shapes, 3 << 30, Some(1 << 30), &mut left_out).unwrap_err();
        assert!(error.to_string().contains("3072 MiB"), "{error}");
        keep_what_fits(&mut shapes, 3 << 30, None, &mut left_out).unwrap();
        assert_eq!(shapes.len(), 3);
    }

    #[test]
    fn what_takes_longer_bounds_reading_or_arithmetic() {
        let config = config(64);
        let limits = Limits { threads: 1, gflops: 1.0, gbytes: 0.001 };
        let (most, bound) = limit(Work::Decode(1), &config, limits);
        assert_eq!(bound, Bound::Read);
        assert!((most - 1e6 / cost::step_bytes(&config, 1, 2)).abs() < 1e-9);
        let (most, bound) = limit(Work::Prefill(50), &config, Limits { gbytes: 1e9, ..limits });
        assert_eq!(bound, Bound::Arithmetic);
        assert!((most / (50.0 * 1e9 / cost::prefill_flops(&config, 50)) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn each_round_has_its_own_limit() {
        let (config, shape) = (config(64), "1A2E:local".parse().unwrap());
        let at = |gbytes| Limits { threads: 1, gflops: 1e6, gbytes };
        let allowed = |gbytes| limit(Work::Decode(1), &config, at(gbytes)).0;
        let measured =
            [(at(10.0), 0.5 * allowed(10.0)), (at(30.0), 0.6 * allowed(30.0)), (at(20.0), 0.9 * allowed(20.0))];
        let figure = figure(Work::Decode(1), shape, &measured, &config);
        assert!((figure.share - 0.6).abs() < 1e-9 && figure.bound == Bound::Read, "{figure:?}");
        assert!((figure.limit_tokens_per_s / allowed(20.0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn transports_stand_beside_the_same_nodes_in_one_process() {
        let shapes: Vec<MeshShape> = ["1A2E:local", "1A2E:tcp", "1A4E:tcp"].map(|s| s.parse().unwrap()).to_vec();
        let limits = Limits { threads: 1, gflops: 1.0, gbytes: 1.0 };
        let rates = [100.0, 80.0, 60.0];
        let figures: Vec<Figure> = shapes
            .iter()
            .zip(rates)
            .map(|(shape, rate)| figure(Work::Decode(1), *shape, &[(limits, rate)], &config(64)))
            .collect();
        let ratios = ratios(&shapes, &figures);
        assert_eq!(ratios.len(), 1, "1A4E has no base here");
        assert_eq!((ratios[0].shape.as_str(), ratios[0].ratio), ("1A2E:tcp", 0.8));
    }
}
