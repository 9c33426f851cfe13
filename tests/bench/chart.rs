//! The ratios to the stock shim as a picture.

use std::fmt::Write;

use crate::columns::Shim;
use crate::report::{Run, digits};
use crate::targets::{Kind, targets};

/// Sizes in pixels: of a bar, of what is between two groups, of a name above its bars, and of a bar as long as the stock
/// shim's. The picture is narrow, so that a phone need not make it much smaller.
const BAR: usize = 11;
const GAP: usize = 9;
const NAME: usize = 15;
const STOCK: f64 = 300.0;
const LEFT: usize = 10;
const WIDTH: usize = 440;
const TOP: usize = 76;
/// No bar is longer than that, as a ratio.
const MOST: f64 = 1.25;

/// Each shim's class in [`STYLE`].
const SHIMS: [(Shim, &str); 4] = [
    (Shim::This, "this"),
    (Shim::ThisCrun, "crun"),
    (Shim::Api, "api"),
    (Shim::Published, "published"),
];

/// The picture brings its own background: a page may be dark on a light desktop, and a picture knows the desktop only.
/// A small text has a seam of that colour, where it crosses the line.
const STYLE: &str = "\
.back { fill: #ffffff } text { fill: #1f2328 } .line { stroke: #59636e }
.small { font-size: 10px; paint-order: stroke; stroke: #ffffff; stroke-width: 2px }
.this { fill: #0969da } .crun { fill: #8250df } .api { fill: #1a7f37 } .published { fill: #9a6700 }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } text { fill: #e6edf3 } .line { stroke: #9198a1 } .small { stroke: #0d1117 }
.this { fill: #4493f8 } .crun { fill: #ab7df8 } .api { fill: #3fb950 } .published { fill: #d29922 }
}";

/// Of one containerd: every target that is a ratio. Shorter is better; what should be more is shown as its inverse.
pub(crate) fn svg(run: &Run) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for target in targets(run.place) {
        let bars: Vec<_> = SHIMS
            .iter()
            .filter_map(|&(shim, class)| {
                let mode = match shim {
                    Shim::Published => Shim::This,
                    Shim::This | Shim::ThisCrun | Shim::Api | Shim::Stock | Shim::StockCrun => shim,
                };
                let ratio = target.measured(run, shim, mode)?;
                match target.kind {
                    Kind::AtMost => Some((class, ratio)),
                    Kind::AtLeast => Some((class, 1.0 / ratio)),
                    Kind::Itself => None,
                }
            })
            .collect();
        if bars.is_empty() {
            continue;
        }
        let name = match target.kind {
            Kind::AtLeast => format!("{} (inverse)", target.what),
            Kind::AtMost | Kind::Itself => target.what,
        };
        y += NAME;
        writeln!(body, "<text x='{LEFT}' y='{}'>{name}</text>", y - 4).unwrap();
        for (class, ratio) in bars {
            let width = (ratio.min(MOST) * STOCK).max(1.0);
            writeln!(
                body,
                "<rect class='{class}' x='{LEFT}' y='{y}' width='{width:.0}' height='{}'/>\
                 <text class='small' x='{:.0}' y='{}'>{}</text>",
                BAR - 1,
                from_left(width) + 4.0,
                y + BAR - 2,
                digits(ratio),
            )
            .unwrap();
            y += BAR;
        }
        y += GAP;
    }
    let mut legend = String::new();
    let shown = SHIMS
        .iter()
        .filter(|(_, class)| body.contains(&format!("<rect class='{class}'")));
    for (number, (shim, class)) in shown.enumerate() {
        let (x, y) = (LEFT + number % 2 * 200, 26 + number / 2 * 16);
        writeln!(
            legend,
            "<rect class='{class}' x='{x}' y='{y}' width='10' height='10'/><text x='{}' y='{}'>{}</text>",
            x + 15,
            y + 9,
            shim.title()
        )
        .unwrap();
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}' \
         font-family='sans-serif' font-size='12'>\n<style>\n{STYLE}\n</style>\n\
         <rect class='back' width='{WIDTH}' height='{height}' rx='6'/>\n\
         <text x='{LEFT}' y='17' font-weight='bold'>{title}: ratios to the stock shim, shorter is better</text>\n{legend}\
         <path class='line' d='M{line} {TOP}V{y}' stroke-dasharray='3 3'/>\n\
         <text class='small' x='{line}' y='{above}' text-anchor='middle'>stock shim = 1</text>\n{body}</svg>\n",
        height = y + 4,
        title = run.title(),
        line = from_left(STOCK),
        above = TOP - 4,
    )
}

/// The place of what is that far from the beginning of the bars.
fn from_left(width: f64) -> f64 {
    f64::from(u32::try_from(LEFT).unwrap()) + width
}
