//! Plots as SVG, without a library.

use std::fmt::Write as _;

/// Bars in groups: one group a case, one bar a series.
#[derive(Debug)]
pub(crate) struct Bars {
    pub(crate) title: String,
    /// What the lengths mean.
    pub(crate) unit: String,
    pub(crate) bars: Vec<(String, f64)>,
}

/// Points joined by lines.
#[derive(Debug)]
pub(crate) struct Lines {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    pub(crate) series: Vec<(String, Vec<(f64, f64)>)>,
}

const WIDTH: f64 = 720.0;
const COLOURS: [&str; 6] = ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a"];

impl Bars {
    pub(crate) fn svg(&self) -> String {
        let most = self.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let (left, row) = (280.0, 26.0);
        let mut svg = open(60.0 + row * self.bars.len() as f64, &self.title, &self.unit);
        for (index, (name, value)) in self.bars.iter().enumerate() {
            let y = 50.0 + row * index as f64;
            let width = (WIDTH - left - 90.0) * value / most;
            let colour = COLOURS[usize::from(!name.starts_with("outbox")) * 5];
            _ = writeln!(
                svg,
                "<text x=\"{x}\" y=\"{text}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{left}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/>\
                 <text x=\"{end:.1}\" y=\"{text}\">{value}</text>",
                x = left - 8.0,
                text = y + 14.0,
                name = escape(name),
                end = left + width + 6.0,
                value = short(*value),
            );
        }
        svg + "</svg>\n"
    }
}

impl Lines {
    pub(crate) fn svg(&self) -> String {
        let (left, top, right, bottom) = (70.0, 50.0, WIDTH - 190.0, 330.0);
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(f64::MIN_POSITIVE, f64::max);
        let (most_x, most_y) = (most(|point| point.0), most(|point| point.1));
        let x = |value: f64| left + (right - left) * value / most_x;
        let y = |value: f64| bottom - (bottom - top) * value / most_y;
        let mut svg = open(bottom + 60.0, &self.title, &self.y);
        for tick in 0..=4 {
            let (of_x, of_y) = (most_x * f64::from(tick) / 4.0, most_y * f64::from(tick) / 4.0);
            _ = writeln!(
                svg,
                "<line x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" \
                 stroke=\"#d0d7de\"/>\
                 <text x=\"{label}\" y=\"{text:.1}\" text-anchor=\"end\">{of_y}</text>\
                 <text x=\"{tick:.1}\" y=\"{below}\" text-anchor=\"middle\">{of_x}</text>",
                at = y(of_y),
                label = left - 8.0,
                text = y(of_y) + 4.0,
                tick = x(of_x),
                below = bottom + 18.0,
                of_x = short(of_x),
                of_y = short(of_y),
            );
        }
        _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            (left + right) / 2.0,
            bottom + 40.0,
            escape(&self.x)
        );
        for (index, (name, points)) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let path: Vec<String> =
                points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
            _ = write!(
                svg,
                "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" \
                 stroke-width=\"2\"/>",
                path = path.join(" ")
            );
            for point in &path {
                let (x, y) = point.split_once(',').unwrap_or(("0", "0"));
                _ = write!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"3\" fill=\"{colour}\"/>");
            }
            let line = top + 20.0 * index as f64;
            _ = writeln!(
                svg,
                "<rect x=\"{}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"{}\">{}</text>",
                right + 16.0,
                line - 10.0,
                right + 34.0,
                line,
                escape(name)
            );
        }
        svg + "</svg>\n"
    }
}

fn open(height: f64, title: &str, below: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#1f2328\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>\
         <text x=\"16\" y=\"38\">{}</text>\n",
        escape(title),
        escape(below)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn short(value: f64) -> String {
    match value {
        v if v >= 10_000.0 => format!("{:.0}k", v / 1_000.0),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_the_width_and_the_others_are_in_proportion() {
        let bars = vec![("a".to_owned(), 50.0), ("b".to_owned(), 100.0)];
        let svg = Bars { title: "<t>".to_owned(), unit: "u".to_owned(), bars }.svg();
        assert!(svg.contains("width=\"175.0\"") && svg.contains("width=\"350.0\""), "{svg}");
        assert!(svg.contains("&lt;t&gt;"));
    }
}
