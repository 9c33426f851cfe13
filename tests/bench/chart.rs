//! The ratios to the stock shim as a picture.

use std::fmt::Write;

use crate::columns::Shim;
use crate::report::{Run, digits};
use crate::targets::{Kind, targets};

/// Sizes in pixels: of a bar, of what is between two groups, of the names, and of a bar as long as the stock shim's.
const BAR: usize = 9;
const GAP: usize = 8;
const NAMES: usize = 270;
const STOCK: f64 = 260.0;
const WIDTH: usize = 620;
const TOP: usize = 50;
/// No bar is longer than that, as a ratio.
const MOST: f64 = 1.25;

const COLOURS: [(Shim, &str); 4] = [
    (Shim::This, "#2f81f7"),
    (Shim::ThisCrun, "#a371f7"),
    (Shim::Api, "#2da44e"),
    (Shim::Published, "#bf8700"),
];

/// Of one containerd: every target that is a ratio. Shorter is better; what should be more is shown as its inverse.
pub(crate) fn svg(run: &Run) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for target in targets(run.place) {
        let bars: Vec<_> = COLOURS
            .iter()
            .filter_map(|&(shim, colour)| {
                let mode = match shim {
                    Shim::Published => Shim::This,
                    Shim::This | Shim::ThisCrun | Shim::Api | Shim::Stock | Shim::StockCrun => shim,
                };
                let ratio = target.measured(run, shim, mode)?;
                match target.kind {
                    Kind::AtMost => Some((colour, ratio)),
                    Kind::AtLeast => Some((colour, 1.0 / ratio)),
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
        let middle = y + bars.len() * BAR / 2 + 4;
        writeln!(
            body,
            "<text x='{}' y='{middle}' text-anchor='end'>{name}</text>",
            NAMES - 8
        )
        .unwrap();
        for (colour, ratio) in bars {
            let width = (ratio.min(MOST) * STOCK).max(1.0);
            let end = f64::from(u32::try_from(NAMES).unwrap()) + width + 4.0;
            writeln!(
                body,
                "<rect x='{NAMES}' y='{y}' width='{width:.0}' height='{}' fill='{colour}'/>\
                 <text class='small' x='{end:.0}' y='{}'>{}</text>",
                BAR - 1,
                y + BAR - 1,
                digits(ratio),
            )
            .unwrap();
            y += BAR;
        }
        y += GAP;
    }
    let line = f64::from(u32::try_from(NAMES).unwrap()) + STOCK;
    let mut legend = String::new();
    for (number, (shim, colour)) in COLOURS.iter().enumerate() {
        let x = 10 + number * 150;
        writeln!(
            legend,
            "<rect x='{x}' y='24' width='10' height='10' fill='{colour}'/><text x='{}' y='33'>{}</text>",
            x + 15,
            shim.title()
        )
        .unwrap();
    }
    // The middle of the grey scale can be read on white and on black.
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}' \
         font-family='sans-serif' font-size='12' fill='#808080'>\n<style>.small {{ font-size: 9px }}</style>\n\
         <text x='10' y='15' font-weight='bold'>{title}: ratios to the stock shim, shorter is better</text>\n{legend}\
         <path d='M{line} {from}V{y}' stroke='#808080' stroke-dasharray='3 3'/>\n\
         <text class='small' x='{line}' y='{above}' text-anchor='middle'>stock shim = 1</text>\n{body}</svg>\n",
        height = y + 4,
        title = run.title(),
        from = TOP - 4,
        above = TOP - 7,
    )
}
