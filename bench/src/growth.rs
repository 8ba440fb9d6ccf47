//! How cost grows: the time of a decode step over streams, experts, expert nodes and context, and of a prefill over context,
//! on models with tiny experts, so that what the machinery costs is not hidden behind arithmetic.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use mesh_transport::TransportKind;
use serde::Serialize;

use crate::about::{JsonArg, Machine};
use crate::chart::{Panel, Series, picture};
use crate::error::BenchError;
use crate::meshes::{self, Load, MeshShape, Meshes, median};
use crate::model::{self, ModelArgs, Shape};

const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const EXPERTS: [usize; 6] = [8, 16, 32, 64, 128, 256];
const NODES: [u16; 5] = [1, 2, 4, 8, 16];
const CONTEXTS: [usize; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];
/// Streams of the axes on which they do not vary.
const STREAMS: usize = 8;
/// Prompt tokens and steps of a decoding stream.
const PROMPT: usize = 4;
const STEPS: usize = 48;
/// How far beyond its bound an exponent may be by the scatter of a measurement.
const SCATTER: f64 = 0.25;
/// What a step may grow like: whatever varies is at most paid for once each.
const LINEAR: f64 = 1.0;
/// What a prefill may grow like over context: each token looks at all before it.
const QUADRATIC: f64 = 2.0;

/// `mesh-bench growth`.
#[derive(Clone, Debug, Args)]
pub struct GrowthArgs {
    /// The folder for cost-growth.svg.
    #[arg(long, value_name = "DIR", default_value = "docs")]
    pub out: PathBuf,
    /// How often each point is measured; the median counts.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=20))]
    pub rounds: u16,
    /// Where meshctl and the services are; beside this program when absent.
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Where the results go.
    #[command(flatten)]
    pub json: JsonArg,
}

/// The model whose sizes vary.
pub fn tiny() -> Shape {
    Shape {
        hidden: 256,
        layers: 4,
        experts: 64,
        top_k: 4,
        intermediate: 64,
        heads: 8,
        kv_heads: 2,
        head_dim: 32,
        vocab: 2048,
        max_position: CONTEXTS[CONTEXTS.len() - 1] + 64,
        seed: 0,
    }
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The model, where nothing varies.
    pub model: Shape,
    /// Measurements of each point.
    pub rounds: u16,
    /// What varied.
    pub axes: Vec<Axis>,
    /// What was not measured, and why.
    pub left_out: Vec<String>,
    /// The whole run.
    pub seconds: f64,
}

/// One thing that varied.
#[derive(Debug, Serialize)]
pub struct Axis {
    /// What was timed.
    pub title: String,
    /// What varied.
    pub varied: &'static str,
    /// The exponent that the work itself justifies, at most.
    pub exponent_max: f64,
    /// For each kind of mesh.
    pub lines: Vec<Line>,
}

/// A kind of mesh.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Which.
    pub name: String,
    /// Size and milliseconds.
    pub points: Vec<(f64, f64)>,
    /// Between each two neighbours: log of the times' ratio over log of the sizes' ratio.
    pub exponents: Vec<f64>,
}

impl Line {
    fn new(name: String, points: Vec<(f64, f64)>) -> Self {
        let exponents = points.windows(2).map(|pair| exponent(pair[0], pair[1])).collect();
        Self { name, points, exponents }
    }
}

fn exponent((x0, y0): (f64, f64), (x1, y1): (f64, f64)) -> f64 {
    (y1 / y0).ln() / (x1 / x0).ln()
}

/// What all points share.
struct Run<'a> {
    args: &'a GrowthArgs,
    models: tempfile::TempDir,
    transports: Vec<TransportKind>,
}

/// Runs it all and draws it.
///
/// # Errors
/// A mesh fails, the picture cannot be written, or Ctrl-C came; nothing is left running in any case.
pub fn run(args: &GrowthArgs) -> Result<Report, BenchError> {
    let begun = Instant::now();
    let (mut transports, mut left_out) = (Vec::new(), Vec::new());
    for transport in [TransportKind::Local, TransportKind::Tcp, TransportKind::Ucx] {
        match meshes::unavailable(transport)? {
            None => transports.push(transport),
            Some(why) => left_out.push(why),
        }
    }
    left_out.iter().for_each(|line| eprintln!("LEFT OUT: {line}"));
    let models = tempfile::tempdir().map_err(BenchError::io("make a temporary folder"))?;
    let run = Run { args, models, transports };
    let axes = meshes::with_meshes(args.bin_dir.as_deref(), async |meshes: &mut Meshes| {
        let mut axes = vec![run.over_streams(meshes).await?, run.over_experts(meshes).await?];
        axes.push(run.over_nodes(meshes).await?);
        axes.extend(run.over_context(meshes).await?);
        Ok(axes)
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    let report = Report { model: tiny(), rounds: args.rounds, axes, left_out, seconds };
    std::fs::create_dir_all(&args.out).map_err(BenchError::file(&args.out))?;
    let path = args.out.join("cost-growth.svg");
    std::fs::write(&path, report.picture()).map_err(BenchError::file(&path))?;
    Ok(report)
}

impl Run<'_> {
    fn model(&self, shape: Shape) -> Result<PathBuf, BenchError> {
        let out = self.models.path().join(format!("experts-{}", shape.experts));
        if !out.is_dir() {
            model::write(&ModelArgs { out: out.clone(), shape, tokenizer: None })?;
        }
        Ok(out)
    }

    async fn start(&self, meshes: &mut Meshes, model: &Path, shape: MeshShape) -> Result<usize, BenchError> {
        eprintln!("{shape}, {}", model.file_name().unwrap_or_default().to_string_lossy());
        meshes.start(model, shape, None).await
    }

    /// The median of the rounds, each with other prompts, after one that is not counted.
    async fn step_ms(&self, meshes: &Meshes, mesh: usize, streams: usize) -> Result<f64, BenchError> {
        let mut each = Vec::new();
        for seed in 0..=usize::from(self.args.rounds) {
            let load = Load { streams, prompt: PROMPT, tokens: STEPS + 1, seed };
            each.push(meshes.step_ms(mesh, load).await?);
        }
        Ok(median(&each[1..]))
    }

    async fn over_streams(&self, meshes: &mut Meshes) -> Result<Axis, BenchError> {
        let model = self.model(tiny())?;
        let mut lines = Vec::new();
        for &transport in &self.transports {
            let shape = MeshShape { attention: 1, experts: 2, transport };
            let mesh = self.start(meshes, &model, shape).await?;
            let mut points = Vec::new();
            for streams in BATCHES {
                points.push((streams as f64, self.step_ms(meshes, mesh, streams).await?));
            }
            meshes.stop().await;
            lines.push(Line::new(shape.to_string(), points));
        }
        Ok(Axis { title: "decode step over streams".to_owned(), varied: "streams", exponent_max: LINEAR, lines })
    }

    async fn over_experts(&self, meshes: &mut Meshes) -> Result<Axis, BenchError> {
        let shape = MeshShape { attention: 1, experts: 2, transport: TransportKind::Local };
        let mut points = Vec::new();
        for experts in EXPERTS {
            let model = self.model(Shape { experts, ..tiny() })?;
            let mesh = self.start(meshes, &model, shape).await?;
            points.push((experts as f64, self.step_ms(meshes, mesh, STREAMS).await?));
            meshes.stop().await;
        }
        let lines = vec![Line::new(shape.to_string(), points)];
        let title = format!("decode step over experts (top-{}, {STREAMS} streams)", tiny().top_k);
        Ok(Axis { title, varied: "experts of a layer", exponent_max: LINEAR, lines })
    }

    async fn over_nodes(&self, meshes: &mut Meshes) -> Result<Axis, BenchError> {
        let model = self.model(tiny())?;
        let mut lines = Vec::new();
        for &transport in &self.transports {
            let mut points = Vec::new();
            for experts in NODES {
                let mesh = self.start(meshes, &model, MeshShape { attention: 1, experts, transport }).await?;
                points.push((f64::from(experts), self.step_ms(meshes, mesh, STREAMS).await?));
                meshes.stop().await;
            }
            lines.push(Line::new(format!("1AnE:{transport}"), points));
        }
        let title = format!("decode step over expert nodes ({STREAMS} streams)");
        Ok(Axis { title, varied: "expert nodes", exponent_max: LINEAR, lines })
    }

    async fn over_context(&self, meshes: &mut Meshes) -> Result<[Axis; 2], BenchError> {
        let shape = MeshShape { attention: 1, experts: 2, transport: TransportKind::Local };
        let model = self.model(tiny())?;
        let mesh = self.start(meshes, &model, shape).await?;
        let (mut steps, mut prefills) = (Vec::new(), Vec::new());
        for context in CONTEXTS {
            let (mut step, mut prefill) = (Vec::new(), Vec::new());
            for seed in 0..=usize::from(self.args.rounds) {
                let load = Load { streams: 1, prompt: context, tokens: STEPS + 1, seed };
                let (first, between) = meshes.both_ms(mesh, load).await?;
                prefill.push(first);
                step.push(between);
            }
            steps.push((context as f64, median(&step[1..])));
            prefills.push((context as f64, median(&prefill[1..])));
        }
        meshes.stop().await;
        let axis = |title: &str, exponent_max, points| Axis {
            title: title.to_owned(),
            varied: "context, tokens",
            exponent_max,
            lines: vec![Line::new(shape.to_string(), points)],
        };
        Ok([
            axis("decode step over context (1 stream)", LINEAR, steps),
            axis("prefill over context (1 stream)", QUADRATIC, prefills),
        ])
    }
}

impl Report {
    /// As text: each point, and the exponent from the one before.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}\nmilliseconds, medians of {} rounds; below them the exponent between neighbours: 0 is constant, 1 is linear\n",
            Machine::here().words(),
            self.rounds
        );
        for axis in &self.axes {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\n{}", axis.title);
            for line in &axis.lines {
                let cell = |text: &mut String, words: String| text.push_str(&format!(" {words:>8}"));
                let _ = write!(text, "  {:<20}", axis.varied);
                line.points.iter().for_each(|(x, _)| cell(&mut text, x.to_string()));
                let _ = write!(text, "\n  {:<20}", line.name);
                line.points.iter().for_each(|(_, y)| cell(&mut text, format!("{y:.2}")));
                let _ = write!(text, "\n  {:<20} {:8}", "exponent", "");
                line.exponents.iter().for_each(|exponent| cell(&mut text, format!("{exponent:.2}")));
                let most = axis.exponent_max + SCATTER;
                let steep = line.exponents.iter().filter(|exponent| **exponent > most).count();
                if steep > 0 {
                    let _ = write!(text, "   STEEPER THAN {} in {steep} places", axis.exponent_max);
                }
                text.push('\n');
            }
        }
        self.left_out.iter().for_each(|line| text.push_str(&format!("LEFT OUT: {line}\n")));
        let _ = writeln!(text, "\n{:.0} s", self.seconds);
        text
    }

    fn picture(&self) -> String {
        let Shape { hidden, layers, experts, top_k, intermediate, .. } = self.model;
        let words = format!(
            "hidden {hidden}, {layers} layers, {experts} experts top-{top_k} of {intermediate} unless varied, bf16; {}",
            Machine::here().words()
        );
        let panel = |axis: &Axis| Panel {
            title: format!("{}, ms", axis.title),
            x_label: axis.varied.to_owned(),
            series: axis
                .lines
                .iter()
                .map(|line| Series { name: line.name.clone(), points: line.points.clone() })
                .collect(),
        };
        picture("How cost grows", &words, &self.axes.iter().map(panel).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_are_slopes_between_neighbours() {
        let line = Line::new("x".into(), vec![(1.0, 3.0), (2.0, 3.0), (4.0, 6.0), (8.0, 24.0)]);
        let expected = [0.0, 1.0, 2.0];
        assert!(line.exponents.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{:?}", line.exponents);
    }

    #[test]
    fn what_grows_faster_than_its_size_is_said_aloud() {
        let axis = |points| Axis {
            title: "t".into(),
            varied: "x",
            exponent_max: LINEAR,
            lines: vec![Line::new("l".into(), points)],
        };
        let table = |points| {
            let axes = vec![axis(points)];
            Report { model: tiny(), rounds: 1, axes, left_out: vec![], seconds: 0.0 }.table()
        };
        assert!(table(vec![(1.0, 1.0), (2.0, 4.0)]).contains("STEEPER THAN 1 in 1 places"));
        assert!(!table(vec![(1.0, 1.0), (2.0, 2.0)]).contains("STEEPER"));
    }

    #[test]
    fn every_model_of_the_run_is_one() {
        for experts in EXPERTS {
            let config = Shape { experts, ..tiny() }.config().unwrap();
            assert!(config.max_position > CONTEXTS[CONTEXTS.len() - 1] + STEPS);
        }
    }
}
