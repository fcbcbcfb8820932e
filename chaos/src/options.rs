//! What a run is told by its command line.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use integration_tests::database::Engine;

use crate::fault::Cast;

/// `chaos --for 60s --seed 7 [--engine mysql] ..`
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Options {
    /// How long writers write and faults come.
    pub(crate) length: Duration,
    pub(crate) seed: u64,
    pub(crate) engine: Engine,
    /// Messages a second.
    pub(crate) rate: f64,
    /// Mean time from one fault to the next.
    pub(crate) every: Duration,
    pub(crate) cast: Cast,
    /// Rows that a relay may have in flight: what a fault may repeat. With few, what waits for one
    /// broker keeps all others waiting; with many, the bound of duplicates says little.
    pub(crate) window: usize,
    /// Where a run keeps its histories, in a folder of its own.
    pub(crate) keep: PathBuf,
    /// Where the report goes, if one is wanted.
    pub(crate) report: Option<PathBuf>,
    /// A defect on purpose, in every relay.
    pub(crate) bug: Option<String>,
}

impl Options {
    pub(crate) fn parse(words: &[String]) -> Result<Self> {
        let mut options = Self {
            length: Duration::from_secs(60),
            seed: rand::random::<u32>().into(),
            engine: Engine::MariaDb,
            rate: 1_500.0,
            every: Duration::from_secs(4),
            cast: Cast { writers: 4, relays: 2, brokers: 3 },
            window: 500,
            keep: std::env::temp_dir().join("outbox-chaos"),
            report: None,
            bug: None,
        };
        for pair in words.chunks(2) {
            let [name, value] = pair else { bail!("{} needs a value", pair.concat()) };
            options.set(name, value).with_context(|| format!("{name} {value}"))?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "--for" => self.length = duration(value)?,
            "--seed" => self.seed = value.parse()?,
            "--engine" => {
                let engine = Engine::ALL.into_iter().find(|engine| engine.name() == value);
                self.engine = engine.context("mariadb or mysql")?;
            }
            "--rate" => self.rate = value.parse()?,
            "--every" => self.every = duration(value)?,
            "--writers" => self.cast.writers = some(value)?,
            "--relays" => self.cast.relays = some(value)?,
            "--window" => self.window = some(value)?,
            "--keep" => self.keep = value.into(),
            "--bug" => self.bug = Some(value.into()),
            "--report" => self.report = Some(value.into()),
            _ => bail!("there is no such option"),
        }
        Ok(())
    }

    /// The command that does the same again.
    pub(crate) fn command(&self) -> String {
        let bug = self.bug.as_ref().map(|bug| format!(" --bug {bug}")).unwrap_or_default();
        format!(
            "cargo xtask chaos --for {}s --seed {} --engine {} --rate {} --every {}s --writers {} \
             --relays {} --window {}{bug}",
            self.length.as_secs_f64(),
            self.seed,
            self.engine,
            self.rate,
            self.every.as_secs_f64(),
            self.cast.writers,
            self.cast.relays,
            self.window,
        )
    }
}

fn some(value: &str) -> Result<usize> {
    match value.parse()? {
        0 => bail!("at least one"),
        count => Ok(count),
    }
}

/// `90s`, `1.5s` or `40m`; longer than nothing.
fn duration(text: &str) -> Result<Duration> {
    let (number, unit) = text.split_at(text.len().saturating_sub(1));
    let seconds = match unit {
        "s" => 1.0,
        "m" => 60.0,
        _ => bail!("a time is written as 90s or 40m"),
    };
    let time = Duration::try_from_secs_f64(number.parse::<f64>()? * seconds)?;
    if time.is_zero() {
        bail!("longer than nothing");
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_command_that_repeats_a_run_is_understood() {
        let options = parse(
            "--for 40m --seed 7 --engine mysql --rate 20.5 --every 1.5s --relays 3 --window 9 --bug no-gate",
        )
        .unwrap();
        assert_eq!(options.length, Duration::from_secs(2_400));
        assert_eq!(options.every, Duration::from_millis(1_500));
        let command = options.command();
        let again = parse(command.strip_prefix("cargo xtask chaos ").unwrap()).unwrap();
        assert_eq!(again, options);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for line in ["--for 60", "--for 0s", "--engine oracle", "--relays 0", "--fast 1", "--seed"]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
