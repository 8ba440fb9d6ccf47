//! Small multiples as SVG: panels with logarithmic axes, a line for each series, every value told above its point, in
//! colours that are read on light and on dark.

use std::fmt::Write as _;

/// One line of a panel.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Points by rising x; both coordinates above 0. Others are left out.
    pub points: Vec<(f64, f64)>,
}

/// One chart of the picture.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Below its x axis.
    pub x_label: String,
    /// Its lines.
    pub series: Vec<Series>,
}

const PANEL_W: f64 = 480.0;
const PANEL_H: f64 = 310.0;
/// Around a panel's plot.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 48.0;
const COLUMNS: usize = 2;
/// Height of the picture's own title.
const HEAD: f64 = 58.0;
/// Classes of the style: one for each series of a panel.
const COLOURS: usize = 3;
/// Between a point and its value, and between values above each other.
const LABEL_GAP: f64 = 7.0;
const LABEL_H: f64 = 11.0;

/// Colours by what the reader's page is, so that the picture needs no background of its own.
const STYLE: &str = "<style>
text{font-family:sans-serif;font-size:12px;fill:#222}.soft{fill:#666}.value{font-size:10px}.title{font-size:14px;font-weight:bold}
.grid{stroke:#ddd;fill:none}.axis{stroke:#222;fill:none}.ground{fill:#fff}
.s0{stroke:#0a6ebd;fill:#0a6ebd}.s1{stroke:#c2410c;fill:#c2410c}.s2{stroke:#2e8b57;fill:#2e8b57}
text.s0,text.s1,text.s2{stroke:none}.line{fill:none;stroke-width:2}
@media (prefers-color-scheme:dark){text{fill:#ddd}.soft{fill:#aaa}.grid{stroke:#3a3f46}.axis{stroke:#bbb}.ground{fill:#14181d}
.s0{stroke:#6cb6ff;fill:#6cb6ff}.s1{stroke:#ff9b5e;fill:#ff9b5e}.s2{stroke:#6fd09a;fill:#6fd09a}.line{fill:none}}
</style>";

/// A logarithmic axis between whole powers of two (x) or marks of 1, 2 and 5 (y).
#[derive(Clone, Debug, PartialEq)]
struct Scale {
    lo: f64,
    hi: f64,
    ticks: Vec<f64>,
}

impl Scale {
    /// A mark at each value, as sizes are few and chosen.
    fn at_values(values: &[f64]) -> Self {
        let mut ticks = values.to_vec();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        let (lo, hi) = (ticks.first().copied().unwrap_or(1.0), ticks.last().copied().unwrap_or(2.0));
        Self { lo, hi, ticks }
    }

    /// Marks at 1, 2 and 5 times powers of ten around the values.
    fn around(values: &[f64]) -> Self {
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(0.0, f64::max);
        let (min, max) = if min.is_finite() { (min, max) } else { (1.0, 1.0) };
        let decades = (min.log10().floor() as i32)..=(max.log10().floor() as i32 + 1);
        let marks: Vec<f64> = decades.flat_map(|power| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(power))).collect();
        let lo = marks.iter().copied().rfind(|mark| *mark <= min).unwrap_or(min);
        let hi = marks.iter().copied().find(|mark| *mark > max).unwrap_or(max);
        Self { lo, hi, ticks: marks.into_iter().filter(|mark| (lo..=hi).contains(mark)).collect() }
    }

    /// From 0 to 1 along the axis; in its middle when it is but one value.
    fn at(&self, value: f64) -> f64 {
        if self.hi > self.lo { (value / self.lo).ln() / (self.hi / self.lo).ln() } else { 0.5 }
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    let digits = (2 - value.abs().log10().floor() as i32).clamp(0, 3) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
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
    let rows = panels.len().div_ceil(COLUMNS).max(1);
    let (width, height) = (COLUMNS as f64 * PANEL_W, HEAD + rows as f64 * PANEL_H);
    let mut svg = String::new();
    line!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">"#
    );
    line!(svg, "{STYLE}\n<rect class=\"ground\" width=\"{width}\" height=\"{height}\"/>");
    line!(svg, r#"<text class="title" x="16" y="24">{}</text>"#, escaped(title));
    line!(svg, r#"<text class="soft" x="16" y="43">{}</text>"#, escaped(words));
    for (i, panel) in panels.iter().enumerate() {
        let (x, y) = ((i % COLUMNS) as f64 * PANEL_W, HEAD + (i / COLUMNS) as f64 * PANEL_H);
        line!(svg, r#"<g transform="translate({x},{y})">"#);
        draw(&mut svg, panel);
        line!(svg, "</g>");
    }
    line!(svg, "</svg>");
    svg
}

fn drawn(series: &Series) -> impl Iterator<Item = (f64, f64)> {
    let points = series.points.iter().copied();
    points.filter(|(x, y)| x.is_finite() && y.is_finite() && *x > 0.0 && *y > 0.0)
}

fn draw(svg: &mut String, panel: &Panel) {
    let (xs, ys): (Vec<f64>, Vec<f64>) = panel.series.iter().flat_map(drawn).unzip();
    line!(svg, r#"<text class="title" x="{LEFT}" y="18">{}</text>"#, escaped(&panel.title));
    let (x_scale, y_scale) = (Scale::at_values(&xs), Scale::around(&ys));
    let (right, bottom) = (PANEL_W - RIGHT, PANEL_H - BOTTOM);
    let px = |x: f64| LEFT + 12.0 + x_scale.at(x) * (right - LEFT - 24.0);
    let py = |y: f64| bottom - y_scale.at(y) * (bottom - TOP);
    for &tick in &y_scale.ticks {
        let y = py(tick);
        line!(svg, r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/>"#);
        line!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{}</text>"#, LEFT - 7.0, y + 4.0, number(tick));
    }
    for &tick in &x_scale.ticks {
        let x = px(tick);
        line!(svg, r#"<path class="axis" d="M{x:.1} {bottom}v5"/>"#);
        line!(svg, r#"<text x="{x:.1}" y="{}" text-anchor="middle">{tick}</text>"#, bottom + 18.0);
    }
    line!(svg, r#"<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>"#);
    let (middle, label) = ((LEFT + right) / 2.0, escaped(&panel.x_label));
    line!(svg, r#"<text class="soft" x="{middle}" y="{}" text-anchor="middle">{label}</text>"#, bottom + 38.0);
    if ys.is_empty() {
        line!(svg, r#"<text class="soft" x="{middle}" y="150" text-anchor="middle">nothing measured</text>"#);
    }
    let mut all = Vec::new();
    for (i, series) in panel.series.iter().enumerate() {
        let colour = i % COLOURS;
        let points: Vec<Point> =
            drawn(series).map(|(x, value)| Point { x: px(x), y: py(value), value, colour }).collect();
        curve(svg, colour, &points);
        all.extend(points);
    }
    labels(svg, all);
    legend(svg, &panel.series);
}

/// Where a measured value lies.
#[derive(Clone, Copy, Debug)]
struct Point {
    x: f64,
    y: f64,
    value: f64,
    colour: usize,
}

fn curve(svg: &mut String, colour: usize, points: &[Point]) {
    let path: Vec<String> = points.iter().map(|p| format!("{:.1} {:.1}", p.x, p.y)).collect();
    if points.len() > 1 {
        line!(svg, r#"<path class="line s{colour}" style="fill:none" d="M{}"/>"#, path.join("L"));
    }
    for Point { x, y, .. } in points {
        line!(svg, r#"<circle class="s{colour}" cx="{x:.1}" cy="{y:.1}" r="3"/>"#);
    }
}

/// The values at each x, one above the other over the topmost point, the largest on top.
fn labels(svg: &mut String, mut points: Vec<Point>) {
    points.sort_by(|a, b| a.x.total_cmp(&b.x).then(a.y.total_cmp(&b.y)));
    for stack in points.chunk_by(|a, b| a.x == b.x) {
        for (below, Point { x, value, colour, .. }) in stack.iter().rev().enumerate() {
            let y = stack[0].y - LABEL_GAP - below as f64 * LABEL_H;
            let number = number(*value);
            line!(svg, r#"<text class="value s{colour}" x="{x:.1}" y="{y:.1}" text-anchor="middle">{number}</text>"#);
        }
    }
}

/// Below the title, each name after a piece of its line.
fn legend(svg: &mut String, series: &[Series]) {
    /// Wide enough for a character of the font.
    const CHARACTER: f64 = 7.0;
    let mut x = LEFT;
    for (i, Series { name, .. }) in series.iter().enumerate() {
        line!(svg, r#"<path class="line s{}" d="M{x:.0} 33h20"/>"#, i % COLOURS);
        line!(svg, r#"<text x="{:.0}" y="37">{}</text>"#, x + 25.0, escaped(name));
        x += 25.0 + name.chars().count() as f64 * CHARACTER + 14.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_factors_are_equal_distances() {
        let scale = Scale::at_values(&[1.0, 4.0, 2.0, 2.0, 8.0]);
        assert_eq!(scale.ticks, [1.0, 2.0, 4.0, 8.0]);
        for (i, tick) in scale.ticks.iter().enumerate() {
            assert!((scale.at(*tick) - i as f64 / 3.0).abs() < 1e-9);
        }
        assert_eq!(Scale::at_values(&[5.0]).at(5.0), 0.5);
    }

    #[test]
    fn values_lie_between_the_marks_around_them() {
        let scale = Scale::around(&[0.3, 7.0]);
        assert_eq!((scale.lo, scale.hi), (0.2, 10.0));
        assert!((scale.ticks.len(), scale.ticks[0], scale.ticks[5]) == (6, 0.2, 10.0), "{:?}", scale.ticks);
        assert!(scale.at(0.3) > 0.0 && scale.at(7.0) < 1.0);
        assert!(Scale::around(&[]).hi > Scale::around(&[]).lo);
    }

    #[test]
    fn numbers_have_three_digits_that_matter() {
        assert_eq!([0.1234, 1.0, 12.34, 1234.5, 0.5].map(number), ["0.123", "1", "12.3", "1234", "0.5"]);
    }

    #[test]
    fn values_above_each_other_stand_as_their_points_do() {
        let at = |y, value| Point { x: 5.0, y, value, colour: 0 };
        let mut svg = String::new();
        labels(&mut svg, vec![at(90.0, 1.0), at(80.0, 3.0), at(85.0, 2.0)]);
        let heights: Vec<String> = [">3<", ">2<", ">1<"]
            .map(|value| svg.lines().find(|line| line.contains(value)).unwrap().to_owned())
            .map(|line| line.split_once(" y=\"").unwrap().1.split('"').next().unwrap().to_owned())
            .to_vec();
        assert_eq!(heights, ["51.0", "62.0", "73.0"]);
    }

    #[test]
    fn every_point_is_drawn_within_its_panel_and_told_in_figures() {
        let series = |name: &str, points| Series { name: name.to_owned(), points };
        let points = vec![(1.0, 1.5), (2.0, 1.5), (256.0, 900.0), (4.0, f64::NAN)];
        let both = vec![series("a<b", points.clone()), series("other", points)];
        let panel = Panel { title: "t".into(), x_label: "x".into(), series: both };
        let svg = picture("title", "words", &[panel]);
        assert_eq!((svg.matches("<circle").count(), svg.matches(">900</text>").count()), (6, 2));
        assert!(svg.contains("a&lt;b") && svg.contains("prefers-color-scheme:dark"));
        for circle in svg.split("<circle ").skip(1) {
            let value = |name: &str| -> f64 {
                let rest = circle.split_once(&format!("{name}=\"")).unwrap().1;
                rest.split('"').next().unwrap().parse().unwrap()
            };
            assert!((LEFT..=PANEL_W - RIGHT).contains(&value("cx")), "{circle}");
            assert!((TOP..=PANEL_H - BOTTOM).contains(&value("cy")), "{circle}");
        }
    }
}
