//! What a part found, as a page and as lines for the summary.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::plot::{Bars, Lines};

/// The page of one part.
#[derive(Debug)]
pub(crate) struct Page {
    title: &'static str,
    text: String,
    verdicts: Vec<Verdict>,
    plots: Vec<(String, String)>,
}

/// A figure that has a target.
#[derive(Debug)]
struct Verdict {
    what: String,
    figure: String,
    target: String,
    met: bool,
}

impl Page {
    pub(crate) fn new(title: &'static str) -> Self {
        Self { title, text: String::new(), verdicts: vec![], plots: vec![] }
    }

    /// A paragraph.
    pub(crate) fn say(&mut self, text: impl AsRef<str>) {
        self.text += text.as_ref();
        self.text += "\n\n";
    }

    /// A table; its first row is the head.
    pub(crate) fn table<const N: usize>(&mut self, head: [&str; N], rows: &[[String; N]]) {
        _ = writeln!(self.text, "| {} |\n|{}", head.join(" | "), "---|".repeat(N));
        for row in rows {
            _ = writeln!(self.text, "| {} |", row.join(" | "));
        }
        self.text.push('\n');
    }

    /// A figure that has a target. `met` decides, not the words.
    pub(crate) fn verdict(
        &mut self,
        what: impl Into<String>,
        figure: impl Into<String>,
        target: impl Into<String>,
        met: bool,
    ) {
        let (what, figure, target) = (what.into(), figure.into(), target.into());
        eprintln!("  {} {what}: {figure} (target {target})", if met { "met   " } else { "MISSED" });
        self.verdicts.push(Verdict { what, figure, target, met });
    }

    pub(crate) fn bars(&mut self, name: &str, bars: &Bars) {
        self.plot(name, &bars.title, bars.svg());
    }

    pub(crate) fn lines(&mut self, name: &str, lines: &Lines) {
        self.plot(name, &lines.title, lines.svg());
    }

    fn plot(&mut self, name: &str, title: &str, svg: String) {
        let file = format!("{name}.svg");
        self.say(format!("![{title}]({file})"));
        self.plots.push((file, svg));
    }

    /// Writes `<name>.md` and its plots.
    pub(crate) fn write(&self, folder: &Path, name: &str, conditions: &str) -> Result<()> {
        fs::create_dir_all(folder)?;
        let mut page = format!("# {}\n\n{conditions}\n\n", self.title);
        if !self.verdicts.is_empty() {
            page += VERDICTS;
            page += "\n|---|---|---|---|\n";
            for Verdict { what, figure, target, met } in &self.verdicts {
                let met = if *met { "met" } else { "**missed**" };
                _ = writeln!(page, "| {what} | {figure} | {target} | {met} |");
            }
            page.push('\n');
        }
        page += &self.text;
        fs::write(folder.join(format!("{name}.md")), page.trim_end().to_owned() + "\n")?;
        for (file, svg) in &self.plots {
            fs::write(folder.join(file), svg)?;
        }
        Ok(())
    }
}

const VERDICTS: &str = "| figure | measured | target | |";
const BEGIN: &str = "<!-- written by `cargo xtask bench` from here -->";
const END: &str = "<!-- to here -->";

/// Gathers the targets of all pages there are, of this run and of earlier ones, into the summary.
pub(crate) fn summarise(folder: &Path, names: &[&str]) -> Result<PathBuf> {
    let path = folder.join("README.md");
    let mut table = format!("{VERDICTS}\n|---|---|---|---|\n");
    for name in names {
        let Ok(page) = fs::read_to_string(folder.join(format!("{name}.md"))) else { continue };
        let rows = page.lines().skip_while(|line| *line != VERDICTS).skip(2);
        for row in rows.take_while(|line| line.starts_with('|')) {
            let row = row.replacen("| ", &format!("| [{name}]({name}.md): "), 1);
            table += &row;
            table.push('\n');
        }
    }
    let text =
        fs::read_to_string(&path).unwrap_or_else(|_| format!("# Benchmarks\n\n{BEGIN}\n{END}\n"));
    fs::write(&path, replace(&text, &table).context("the summary has lost its marks")?)?;
    Ok(path)
}

/// The text with what is between the marks replaced.
fn replace(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nz\n");
        let new = replace(&text, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nz\n"));
        assert_eq!(replace(&new, "new\n").unwrap(), new);
        assert_eq!(replace("a", "b"), None);
    }
}
