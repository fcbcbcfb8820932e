//! What a run found, in words.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    check::{Excuses, Findings},
    fault::Kind,
    options::Options,
    stage::Stage,
};

/// What happened besides the findings.
#[derive(Debug)]
pub(crate) struct Tally {
    /// How often each kind of fault happened.
    classes: BTreeMap<String, usize>,
    /// Faults that found nothing to strike.
    missed: usize,
    excuses: Excuses,
    took: Duration,
}

impl Tally {
    pub(crate) fn of(
        tried: &[(Kind, Option<(Instant, Instant)>)],
        excuses: Excuses,
        took: Duration,
    ) -> Self {
        let mut tally = Self { classes: BTreeMap::new(), missed: 0, excuses, took };
        for (kind, times) in tried {
            match times {
                Some(_) => *tally.classes.entry(kind.class()).or_default() += 1,
                None => tally.missed += 1,
            }
        }
        tally
    }

    fn faults(&self) -> usize {
        self.classes.values().sum()
    }
}

/// One line: what a run is known by.
pub(crate) fn summary(options: &Options, findings: &Findings, tally: &Tally) -> String {
    let Findings {
        committed, judged, records, lost, ghosts, duplicates, excused, disordered, ..
    } = findings;
    let verdict = match findings.violations().len() {
        0 => "ok".to_owned(),
        count => format!("{count} VIOLATIONS"),
    };
    format!(
        "chaos: {}, seed {}, {} s: {} faults, {} messages committed, {} of them judged \
         for loss, {} records: {lost} lost, {ghosts} \
         ghosts, {disordered} out of order, {} duplicates of at most {}; recovery {:.1} s (median), \
         {:.1} s (longest): {verdict}",
        options.engine,
        options.seed,
        options.length.as_secs(),
        tally.faults(),
        grouped(*committed),
        grouped(*judged),
        grouped(*records),
        grouped(*duplicates),
        grouped(*excused),
        findings.recovery.median.as_secs_f64(),
        findings.recovery.longest.as_secs_f64(),
    )
}

/// All figures and all faults, as two tables.
pub(crate) fn figures(findings: &Findings, tally: &Tally) -> String {
    let Excuses { window, faults, leases_lost, ambiguous } = tally.excuses;
    let count = |number: usize| grouped(number);
    let rows = [
        ("messages committed", count(findings.committed)),
        ("of which judged for loss", count(findings.judged)),
        ("confirmed to their writers", count(findings.ok)),
        ("failed or rolled back", count(findings.failed)),
        (
            "unknown to their writers, of which committed",
            format!("{}, {}", count(findings.unknown), count(findings.unknown_committed)),
        ),
        ("records read", count(findings.records)),
        ("lost", count(findings.lost)),
        ("ghosts", count(findings.ghosts)),
        ("first appearances out of order", count(findings.disordered)),
        ("duplicates", count(findings.duplicates)),
        (
            "bound of duplicates",
            format!(
                "{} = {window} in flight x ({} relays struck by faults + {} leases lost) + {} \
                 unclear answers",
                count(findings.excused),
                count(faults),
                count(leases_lost),
                count(ambiguous),
            ),
        ),
        ("confirmed by the database and not in it", count(findings.forgotten)),
        ("in the database and never sent", count(findings.unexplained)),
        ("left in the outbox", count(findings.left)),
        ("held, dead or with an attempt counted", count(findings.blamed)),
        ("processes that ended by themselves", count(findings.fell)),
        (
            "from a fault's end to the next delivery",
            format!(
                "median {:.2} s, longest {:.2} s",
                findings.recovery.median.as_secs_f64(),
                findings.recovery.longest.as_secs_f64()
            ),
        ),
        ("faults that happened", count(tally.faults())),
        ("faults that found nothing to strike", count(tally.missed)),
        ("took, without the start of the servers", format!("{} s", tally.took.as_secs())),
    ];
    let mut text = "| what | figure |\n| --- | --- |\n".to_owned();
    for (what, figure) in rows {
        _ = writeln!(text, "| {what} | {figure} |");
    }
    text += "\n| fault | times |\n| --- | --- |\n";
    for (class, times) in &tally.classes {
        _ = writeln!(text, "| {class} | {times} |");
    }
    text
}

/// Writes the report of a run into the folder, named after its day.
pub(crate) fn write(
    folder: &Path,
    options: &Options,
    stage: &Stage,
    findings: &Findings,
    tally: &Tally,
) -> Result<PathBuf> {
    let today = chrono::Utc::now().format("%Y-%m-%d");
    let Options { engine, seed, rate, cast, .. } = options;
    let violations = findings.violations();
    let verdict = if violations.is_empty() {
        "Nothing was violated.".to_owned()
    } else {
        format!("VIOLATED: {}.", violations.join("; "))
    };
    let text = format!(
        "# Chaos on {today}: {engine}, seed {seed}\n\n\
         {verdict} {seconds} s of writing at up to {rate} messages a second by {writers} writers, {relays} \
         relays, {brokers} brokers (three copies, two in sync), {version}, Apache Kafka {kafka}. \
         {machine}, shared by all of them.\n\n\
         ```sh\n{command}\n```\n\n{figures}\n\
         Each message was committed with a row of its own in a business table, which tells what was \
         committed whatever a writer was told. Of the topic that was deleted, messages whose \
         transaction began after it was last created are judged as all others; older ones must only \
         be no ghosts.\n",
        seconds = options.length.as_secs(),
        writers = cast.writers,
        relays = cast.relays,
        brokers = cast.brokers,
        version = stage.database.version(),
        kafka = kafka_version().context("the version of Kafka")?,
        machine = machine(),
        command = options.command(),
        figures = figures(findings, tally),
    );
    fs::create_dir_all(folder)?;
    let path = folder.join(format!("{today}-{engine}-{seed}.md"));
    fs::write(&path, text)?;
    Ok(path)
}

/// Of the brokers, as they are fetched.
fn kafka_version() -> Option<&'static str> {
    let pom = include_str!("../../integration-tests/src/native/pom.xml");
    let (_, rest) = pom.split_once("<artifactId>kafka_2.13</artifactId>")?;
    let (_, rest) = rest.split_once("<version>")?;
    Some(rest.split_once("</version>")?.0)
}

fn machine() -> String {
    let line = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned));
        line.map(|it| it.trim_start_matches([' ', '\t', ':']).to_owned()).unwrap_or_default()
    };
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let memory = line("/proc/meminfo", "MemTotal");
    let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or_default();
    format!("{cores} cores ({}), {} GiB of memory", line("/proc/cpuinfo", "model name"), kib >> 20)
}

/// A number in groups of three digits.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three_digits() {
        for (number, text) in [(0, "0"), (999, "999"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn the_version_of_kafka_is_read_from_where_it_is_fetched_from() {
        let version = kafka_version().unwrap();
        assert!(version.starts_with(|digit: char| digit.is_ascii_digit()), "{version}");
    }
}
