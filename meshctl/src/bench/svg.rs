//! A small writer of line charts as SVG: panels with axes, ticks, lines with markers, and a legend.

use std::fmt::Write;

/// One line of a panel.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Points by rising x. A point that is not finite is left out.
    pub points: Vec<(f64, f64)>,
    /// Its colour.
    pub colour: &'static str,
    /// Drawn dashed and without markers: a bound or an ideal, not a measurement.
    pub guide: bool,
}

/// One chart of the picture.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Below its x axis.
    pub x_label: String,
    /// A wide span of values makes its y axis logarithmic.
    pub may_log: bool,
    /// Its lines.
    pub series: Vec<Series>,
}

const PANEL_W: f64 = 460.0;
const PANEL_H: f64 = 300.0;
/// Around a panel's plot: left for numbers, top for the title and legend, bottom for numbers and the label.
const LEFT: f64 = 62.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 46.0;
const COLUMNS: usize = 2;
/// Height of the picture's own title.
const HEAD: f64 = 58.0;
/// Values that span more than this factor get a logarithmic axis: on a linear one the small would all be zero.
const LOG_FROM: f64 = 25.0;
const TICKS: f64 = 5.0;

/// An axis: values to pixels.
#[derive(Clone, Debug, PartialEq)]
struct Axis {
    lo: f64,
    hi: f64,
    log: bool,
    ticks: Vec<f64>,
}

impl Axis {
    /// Chosen by the values; `may_log` is whether a wide span may become logarithmic.
    fn over(values: &[f64], may_log: bool) -> Self {
        let max = values.iter().copied().fold(0.0, f64::max);
        let min = values.iter().copied().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
        if may_log && min.is_finite() && max / min > LOG_FROM { Self::log(min, max) } else { Self::linear(max) }
    }

    /// From 0 to a round number.
    fn linear(max: f64) -> Self {
        let max = if max > 0.0 { max } else { 1.0 };
        let step = round_step(max / TICKS);
        let count = (max / step - 1e-9).ceil().max(1.0) as u32;
        let ticks: Vec<f64> = (0..=count).map(|i| f64::from(i) * step).collect();
        Self { lo: 0.0, hi: f64::from(count) * step, log: false, ticks }
    }

    /// Between powers of ten, or 2 and 5 times one.
    fn log(min: f64, max: f64) -> Self {
        let decades = (min.log10().floor() as i32)..=(max.log10().ceil() as i32);
        let all: Vec<f64> = decades.flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e))).collect();
        let lo = all.iter().copied().rfind(|v| *v <= min * 1.0001).unwrap_or(min);
        let hi = all.iter().copied().find(|v| *v >= max * 0.9999).unwrap_or(max);
        let within: Vec<f64> = all.into_iter().filter(|v| (lo..=hi).contains(v)).collect();
        // Many decades: their own marks only.
        let whole = |v: &f64| (v.log10() - v.log10().round()).abs() < 1e-9;
        let ticks = if within.len() > 10 { within.into_iter().filter(whole).collect() } else { within };
        Self { lo, hi, log: true, ticks }
    }

    /// From 0 to 1 along the axis.
    fn at(&self, value: f64) -> f64 {
        if self.log {
            (value.max(self.lo) / self.lo).ln() / (self.hi / self.lo).ln()
        } else {
            (value - self.lo) / (self.hi - self.lo)
        }
    }
}

/// The least of 1, 2, 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= step * 0.9999);
    factor.unwrap_or(10.0) * power
}

/// A number as short as it can be told.
fn number(value: f64) -> String {
    if value.abs() >= 1e6 || (value != 0.0 && value.abs() < 1e-3) {
        return format!("{value:e}");
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Writing to a String cannot fail.
macro_rules! line {
    ($svg:expr, $($words:tt)*) => {{ let _ = writeln!($svg, $($words)*); }};
}

/// The picture: a title, a line of words below it, panels in two columns.
pub fn picture(title: &str, words: &str, panels: &[Panel]) -> String {
    let columns = panels.len().clamp(1, COLUMNS);
    let rows = panels.len().div_ceil(COLUMNS).max(1);
    let (width, height) = (columns as f64 * PANEL_W, HEAD + rows as f64 * PANEL_H);
    let mut svg = String::new();
    line!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="12" fill="#222">"##
    );
    line!(svg, r##"<rect width="{width}" height="{height}" fill="#fff"/>"##);
    line!(svg, r#"<text x="16" y="24" font-size="16" font-weight="bold">{}</text>"#, escaped(title));
    line!(svg, r##"<text x="16" y="43" fill="#555">{}</text>"##, escaped(words));
    for (i, panel) in panels.iter().enumerate() {
        let (x, y) = ((i % COLUMNS) as f64 * PANEL_W, HEAD + (i / COLUMNS) as f64 * PANEL_H);
        line!(svg, r#"<g transform="translate({x},{y})">"#);
        draw(&mut svg, panel);
        line!(svg, "</g>");
    }
    line!(svg, "</svg>");
    svg
}

fn finite(series: &Series) -> impl Iterator<Item = (f64, f64)> {
    series.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite())
}

fn draw(svg: &mut String, panel: &Panel) {
    let (xs, ys): (Vec<f64>, Vec<f64>) = panel.series.iter().flat_map(finite).unzip();
    line!(svg, r#"<text x="{LEFT}" y="18" font-size="14" font-weight="bold">{}</text>"#, escaped(&panel.title));
    let (x_axis, y_axis) = (Axis::over(&xs, true), Axis::over(&ys, panel.may_log));
    let (right, bottom) = (PANEL_W - RIGHT, PANEL_H - BOTTOM);
    let px = |x: f64| LEFT + x_axis.at(x) * (right - LEFT);
    let py = |y: f64| bottom - y_axis.at(y) * (bottom - TOP);

    for &tick in &y_axis.ticks {
        let y = py(tick);
        line!(svg, r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#e4e4e4"/>"##);
        line!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{}</text>"#, LEFT - 7.0, y + 4.0, number(tick));
    }
    for &tick in &x_axis.ticks {
        let x = px(tick);
        line!(svg, r##"<path d="M{x:.1} {bottom}v5" stroke="#222"/>"##);
        line!(svg, r#"<text x="{x:.1}" y="{}" text-anchor="middle">{}</text>"#, bottom + 18.0, number(tick));
    }
    line!(svg, r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>"##);
    let middle = (LEFT + right) / 2.0;
    let label = escaped(&panel.x_label);
    line!(svg, r##"<text x="{middle}" y="{}" text-anchor="middle" fill="#555">{label}</text>"##, bottom + 36.0);
    if ys.is_empty() {
        line!(svg, r##"<text x="{middle}" y="150" text-anchor="middle" fill="#888">nothing measured</text>"##);
    }
    for series in &panel.series {
        let points: Vec<(f64, f64)> = finite(series).map(|(x, y)| (px(x), py(y))).collect();
        curve(svg, series, &points);
    }
    legend(svg, &panel.series);
}

fn curve(svg: &mut String, series: &Series, points: &[(f64, f64)]) {
    let colour = series.colour;
    let dash = if series.guide { r#" stroke-dasharray="6 4""# } else { "" };
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
    if points.len() > 1 {
        line!(svg, r#"<path d="M{}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"#, path.join("L"));
    }
    if !series.guide {
        for (x, y) in points {
            line!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{colour}"/>"#);
        }
    }
}

/// Below the title, each name after a piece of its line.
fn legend(svg: &mut String, series: &[Series]) {
    /// Wide enough for a character of the font.
    const CHARACTER: f64 = 7.0;
    let mut x = LEFT;
    for Series { name, colour, guide, .. } in series {
        let dash = if *guide { r#" stroke-dasharray="6 4""# } else { "" };
        line!(svg, r#"<path d="M{x:.0} 33h20" stroke="{colour}" stroke-width="2"{dash}/>"#);
        line!(svg, r#"<text x="{:.0}" y="37">{}</text>"#, x + 25.0, escaped(name));
        x += 25.0 + name.chars().count() as f64 * CHARACTER + 14.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_axis_starts_at_zero_and_ends_at_a_round_number() {
        let axis = Axis::over(&[3.0, 42.0], true);
        assert_eq!(axis, Axis { lo: 0.0, hi: 50.0, log: false, ticks: vec![0.0, 10.0, 20.0, 30.0, 40.0, 50.0] });
        assert_eq!((axis.at(0.0), axis.at(25.0), axis.at(50.0)), (0.0, 0.5, 1.0));
        assert_eq!(Axis::over(&[], true).hi, 1.0);
        assert_eq!(Axis::over(&[0.0], true).hi, 1.0);
        assert!(!Axis::over(&[1.0, 1000.0], false).log);
        assert_eq!(Axis::over(&[50.0], true).hi, 50.0, "a round number needs no further step");
    }

    #[test]
    fn a_wide_span_is_logarithmic_and_evenly_spaced_by_factor() {
        let axis = Axis::over(&[1.5, 180.0], true);
        assert_eq!((axis.lo, axis.hi, axis.log), (1.0, 200.0, true));
        assert_eq!(axis.ticks, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
        assert!((axis.at(20.0) - axis.at(2.0) - (axis.at(100.0) - axis.at(10.0))).abs() < 1e-9);
        assert_eq!(Axis::over(&[1e-3, 1e6], true).ticks.len(), 10, "decades only");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.25, 40.0, 1500.0, 2e6].map(number), ["0", "0.25", "40", "1500", "2e6"]);
    }

    fn panel(points: Vec<(f64, f64)>) -> Panel {
        let series = Series { name: "p50 <a&b>".to_owned(), points, colour: "#06c", guide: false };
        Panel { title: "TTFT".to_owned(), x_label: "requests/s".to_owned(), may_log: true, series: vec![series] }
    }

    #[test]
    fn every_point_has_its_marker_inside_the_plot_and_words_are_escaped() {
        let svg = picture("t", "w", &[panel(vec![(1.0, 5.0), (2.0, 50.0), (3.0, f64::NAN), (4.0, 10.0)])]);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("p50 &lt;a&amp;b&gt;") && !svg.contains("NaN"));
        for circle in svg.lines().filter(|l| l.starts_with("<circle")) {
            let value = |name: &str| -> f64 {
                let rest = circle.split_once(&format!("{name}=\"")).unwrap().1;
                rest.split('"').next().unwrap().parse().unwrap()
            };
            assert!((LEFT..=PANEL_W - RIGHT).contains(&value("cx")), "{circle}");
            assert!((TOP..=PANEL_H - BOTTOM).contains(&value("cy")), "{circle}");
        }
        assert_eq!(svg.matches("<g ").count(), svg.matches("</g>").count());
    }

    #[test]
    fn one_point_and_none_draw_too() {
        assert!(picture("t", "w", &[panel(vec![(1.0, 5.0)])]).contains("<circle"));
        assert!(picture("t", "w", &[panel(vec![])]).contains("nothing measured"));
    }
}
