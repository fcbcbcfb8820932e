//! What a writer knows of its transactions: a file that only grows.
//!
//! A line is in the file before the transaction adds anything, and another one once it has ended.
//! Each is one `write` to the file: a killed process leaves what it wrote to the system, which does
//! not crash here, so nothing is flushed to the disk.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::Write,
    path::Path,
};

use anyhow::{Context, Result};
use outbox_core::MessageId;

use crate::entry::Entry;

/// What became of a transaction, as far as its writer knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// COMMIT was confirmed.
    Ok,
    /// COMMIT was never sent.
    Failed,
    /// COMMIT was sent and not confirmed, or the writer ended before it could say.
    Unknown,
}

/// A message that a writer tried to commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) id: MessageId,
    pub(crate) entry: Entry,
    /// When its transaction began, in microseconds of the machine's clock.
    pub(crate) began: u64,
    pub(crate) outcome: Outcome,
}

/// The file of one start of a writer.
#[derive(Debug)]
pub(crate) struct History {
    file: File,
    transactions: u64,
}

impl History {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create_new(true).append(true).open(path);
        let file = file.with_context(|| format!("a history at {}", path.display()))?;
        Ok(Self { file, transactions: 0 })
    }

    /// A transaction is about to add these messages of one aggregate, in their order. Its number.
    pub(crate) fn tries(&mut self, began: u64, first: Entry, ids: &[MessageId]) -> Result<u64> {
        let number = self.transactions;
        self.transactions += 1;
        let ids: Vec<_> = ids.iter().map(MessageId::to_string).collect();
        let Entry { aggregate, sequence } = first;
        self.write(&format!("try {number} {began} {aggregate} {sequence} {}\n", ids.join(",")))?;
        Ok(number)
    }

    /// It has ended.
    pub(crate) fn ended(&mut self, number: u64, outcome: Outcome) -> Result<()> {
        let word = match outcome {
            Outcome::Ok => "ok",
            Outcome::Failed => "failed",
            Outcome::Unknown => "unknown",
        };
        self.write(&format!("{word} {number}\n"))
    }

    fn write(&mut self, line: &str) -> Result<()> {
        self.file.write_all(line.as_bytes()).context("a history")
    }
}

/// What a file tells, in its order. A last line without an end is none.
pub(crate) fn read(text: &str) -> Result<Vec<Attempt>> {
    let mut attempts: Vec<Attempt> = vec![];
    let mut places = HashMap::new();
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let words: Vec<_> = line.split(' ').collect();
        let outcome = match words[..] {
            ["try", number, began, aggregate, first, ids] => {
                let start = attempts.len();
                let (began, first) = (began.parse()?, first.parse::<u64>()?);
                for (id, sequence) in ids.split(',').zip(first..) {
                    let entry = Entry { aggregate: aggregate.parse()?, sequence };
                    let outcome = Outcome::Unknown;
                    attempts.push(Attempt { id: id.parse()?, entry, began, outcome });
                }
                places.insert(number, start..attempts.len());
                continue;
            }
            ["ok", number] => (number, Outcome::Ok),
            ["failed", number] => (number, Outcome::Failed),
            ["unknown", number] => (number, Outcome::Unknown),
            _ => anyhow::bail!("no line of a history: {line:?}"),
        };
        let (number, outcome) = outcome;
        let place = places.remove(number).with_context(|| format!("never tried: {line:?}"))?;
        for attempt in &mut attempts[place] {
            attempt.outcome = outcome;
        }
    }
    Ok(attempts)
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_has_no_end_is_unknown() {
        let path = env::temp_dir().join(format!("outbox-chaos-history-{}", process::id()));
        let mut history = History::create(&path).unwrap();
        let ids: Vec<_> = (0..5).map(|number| MessageId::from_bytes([number; 16])).collect();
        let first = Entry { aggregate: 3, sequence: 8 };
        let ok = history.tries(11, first, &ids[..2]).unwrap();
        history.ended(ok, Outcome::Ok).unwrap();
        let failed = history.tries(12, first, &ids[2..3]).unwrap();
        history.ended(failed, Outcome::Failed).unwrap();
        let unknown = history.tries(13, first, &ids[3..4]).unwrap();
        history.ended(unknown, Outcome::Unknown).unwrap();
        history.tries(14, first, &ids[4..]).unwrap();
        let attempts = read(&fs::read_to_string(&path).unwrap()).unwrap();
        fs::remove_file(path).unwrap();

        let found: Vec<_> = attempts.iter().map(|it| (it.id, it.began, it.outcome)).collect();
        let (ok, failed, unknown) = (Outcome::Ok, Outcome::Failed, Outcome::Unknown);
        let outcomes = [(11, ok), (11, ok), (12, failed), (13, unknown), (14, unknown)];
        let expected = ids.iter().zip(outcomes).map(|(id, (began, outcome))| (*id, began, outcome));
        assert_eq!(found, expected.collect::<Vec<_>>());
        assert_eq!(attempts[1].entry, Entry { sequence: 9, ..first });
    }

    #[test]
    fn a_line_cut_short_by_a_kill_is_left_out_and_a_strange_one_is_an_error() {
        let id = MessageId::from_bytes([1; 16]);
        let line = format!("try 0 1 2 3 {id}\n");
        assert_eq!(read(&format!("{line}ok")).unwrap()[0].outcome, Outcome::Unknown);
        assert!(read(line.trim_end()).unwrap().is_empty());
        read("perhaps 0\n").unwrap_err();
        read("ok 0\n").unwrap_err();
    }
}
