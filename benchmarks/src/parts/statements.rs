//! What the forms of the two statements cost that a relay runs for every message.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use outbox_core::{
    Lane, MessageId, Position, Store,
    delivery::{Receipt, RowId},
    store::{Claim, Delivered, Page as Rows, Settle},
};
use tokio::task::JoinSet;

use crate::{
    cpu::Cpu,
    lab::{Lab, per_second},
    raw, relay,
    report::Page,
    site::{Backlog, Site, run as execute},
    stats::{Runs, rate},
};

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let rows = lab.pick(9_000, 200_000);
    let mut page = Page::new("Statements");
    page.say(format!(
        "Each form reads or deletes the same {rows} rows of 1 KiB, over one connection unless \
         more are named, with nothing else going on. Rows a second, and processor time of the \
         database for each row in µs: the figure to compare, since the machine's other work hardly \
         touches it. `ours` is what the relay sends."
    ));
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        page.say(format!("## {engine}"));
        reads(lab, &site, rows, &mut page).await?;
        deletes(lab, &site, rows, &mut page).await?;
    }
    Ok(page)
}

/// What reads.
#[derive(Debug, Clone, Copy)]
enum Reader {
    Prepared,
    /// Our store, with so many of the sixteen lanes.
    Ours(u16),
    /// The wanted rows of four lanes joined to the ids of all, without what only our store reads.
    Joined(Join),
}

#[derive(Debug, Clone, Copy)]
enum Join {
    /// To the table itself, as ours.
    Table,
    /// To a table of ids, in which those of other lanes are null.
    Ids,
    /// To a table of ids and lanes, which are compared.
    Lanes,
}

const READERS: &[(&str, Reader)] = &[
    ("id, key and payload, prepared", Reader::Prepared),
    ("**ours: the whole row**", Reader::Ours(16)),
    ("**ours: four lanes of sixteen, bare ids of the others**", Reader::Ours(4)),
    ("the same with fewer columns", Reader::Joined(Join::Table)),
    ("with fewer columns, from a table of ids", Reader::Joined(Join::Ids)),
    ("with fewer columns, lanes compared where rows are joined", Reader::Joined(Join::Lanes)),
];

async fn reads(lab: &Lab, site: &Site, rows: usize, page: &mut Page) -> Result<()> {
    site.fill("statements", Backlog::of(rows)).await?;
    let mut table = vec![];
    for (name, reader) in READERS {
        let (mut rates, mut cpu) = (Runs::default(), Cpu::default());
        let rounds = lab.pick(1, 5);
        for _ in 0..rounds {
            let before = lab.cpu(site.engine).await?;
            let took = match reader {
                Reader::Prepared => raw::read(site, rows).await?,
                Reader::Ours(lanes) => claim(site, *lanes, rows).await?,
                Reader::Joined(join) => joined(site, rows, *join).await?,
            };
            cpu += lab.cpu(site.engine).await? - before;
            rates.push(per_second(rows, took));
        }
        table.push(line(name, &rates, &cpu, rows * rounds));
    }
    page.table(["read", "rows/s", "database, µs"], &table);
    lab.progress(format!("{}: reads", site.engine));
    Ok(())
}

fn line(name: &str, rates: &Runs, cpu: &Cpu, rows: usize) -> [String; 3] {
    [name.to_owned(), rates.rate(), format!("{:.2}", cpu.database * 1e6 / rows as f64)]
}

/// Reads by our store, as the relay does.
async fn claim(site: &Site, lanes: u16, rows: usize) -> Result<Duration> {
    let store = site.store()?;
    let lanes: Vec<Lane> = (0..lanes).map(Lane).collect();
    store.open().await?;
    let runtime = relay::runtime()?;
    let read = runtime.spawn(async move {
        let began = Instant::now();
        let (mut after, mut count) = (Position::START, 0);
        while count < rows {
            let page = Rows::new(&lanes, after, 4_000);
            let reply = store.claim(Claim::new(16 << 20).page(page)).await?;
            let read = reply.rows.len() + reply.passed.len();
            anyhow::ensure!(read > 0, "rows are missing");
            count += read;
            after = reply.covered;
        }
        anyhow::Ok(began.elapsed())
    });
    let took = read.await?;
    runtime.shutdown_background();
    took
}

/// Reads nearly what our store does, joined in this way.
async fn joined(site: &Site, rows: usize, join: Join) -> Result<Duration> {
    let mut connection = site.connect().await?;
    let began = Instant::now();
    for after in (0..rows).step_by(4_000) {
        let of_ids =
            |ids| format!("(SELECT {ids} FROM outbox WHERE id > {after} ORDER BY id LIMIT 4000) p");
        let (ids, on, which) = match join {
            Join::Table => (
                "outbox p FORCE INDEX (PRIMARY)".to_owned(),
                "o.id = IF(p.lane IN (0,1,2,3), p.id, NULL)",
                format!("WHERE p.id > {after} ORDER BY p.id LIMIT 4000"),
            ),
            Join::Ids => (
                of_ids("id, IF(lane IN (0,1,2,3), id, NULL) AS own"),
                "o.id = p.own",
                "ORDER BY p.id".to_owned(),
            ),
            Join::Lanes => (
                of_ids("id, lane"),
                "o.id = p.id AND p.lane IN (0,1,2,3)",
                "ORDER BY p.id".to_owned(),
            ),
        };
        let page = format!(
            "SELECT p.id, o.lane, o.message_id, o.topic, o.message_key, o.partition_no, o.headers, \
               o.payload, TIMESTAMPDIFF(MICROSECOND, o.created_at, UTC_TIMESTAMP(6)) \
             FROM {ids} LEFT JOIN outbox o FORCE INDEX (PRIMARY) ON {on} {which}"
        );
        execute(&mut connection, &page).await?;
    }
    Ok(began.elapsed())
}

/// How rows are named in a DELETE.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// `id IN (..)` of so many.
    Ids(usize),
    /// The same in no order.
    Shuffled,
    /// `id IN (..)` and `message_id IN (..)`.
    Listed,
    /// `id IN (..)`, and the message at its place in one literal.
    Placed,
    /// By our store: runs of so many neighbours, one of so many runs.
    Ours(usize, usize),
    /// One range of so many.
    Range(usize),
    /// `(id, message_id) IN (..)`.
    Pairs,
}

/// So many rows are named by a statement unless the form says otherwise.
const LIST: usize = 900;

/// What is tried: a name, a form, how many connections, and whether the binary log keeps only what
/// tells rows apart.
const FORMS: &[(&str, Form, usize, bool)] = &[
    ("`id IN` of 900", Form::Ids(900), 1, false),
    ("`id IN` of 300", Form::Ids(300), 1, false),
    ("`id IN` of 5,000", Form::Ids(5_000), 1, false),
    ("`id IN` of 900, in no order", Form::Shuffled, 1, false),
    ("a range of 900 (unsafe: takes rows nobody published)", Form::Range(900), 1, false),
    ("`id IN` of 900, and `message_id IN`", Form::Listed, 1, false),
    ("`id IN` of 900, and all messages in one literal", Form::Placed, 1, false),
    ("**ours, neighbours**", Form::Ours(900, 1), 1, false),
    ("**ours, runs of 100, every second**", Form::Ours(100, 2), 1, false),
    ("**ours, runs of 16, every second**", Form::Ours(16, 2), 1, false),
    ("**ours, runs of 8, every second**", Form::Ours(8, 2), 1, false),
    ("**ours, every second row**", Form::Ours(1, 2), 1, false),
    ("**ours, every fourth row**", Form::Ours(1, 4), 1, false),
    ("**ours, every sixth row**", Form::Ours(1, 6), 1, false),
    ("**ours, every eighth row: messages listed**", Form::Ours(1, 8), 1, false),
    ("pairs of id and message id", Form::Pairs, 1, false),
    ("`id IN` of 900, two connections", Form::Ids(900), 2, false),
    ("`id IN` of 900, four connections", Form::Ids(900), 4, false),
    ("`id IN` of 900, minimal row image", Form::Ids(900), 1, true),
    ("`id IN` of 900, minimal row image, two connections", Form::Ids(900), 2, true),
];

async fn deletes(lab: &Lab, site: &Site, rows: usize, page: &mut Page) -> Result<()> {
    let mut table = vec![];
    for (name, form, connections, minimal) in FORMS {
        // A list of pairs is no range for every optimiser: a few rows tell.
        let rows = if matches!(form, Form::Pairs) { rows.min(5_000) } else { rows };
        let (mut rates, mut cpu) = (Runs::default(), Cpu::default());
        let rounds = lab.pick(1, 3);
        for _ in 0..rounds {
            site.fill("statements", Backlog::of(rows)).await?;
            let before = lab.cpu(site.engine).await?;
            let took = match form {
                Form::Ours(run, of) => settle(site, rows, *run, *of).await?,
                _ => delete(site, rows, *form, *connections, *minimal).await?,
            };
            cpu += lab.cpu(site.engine).await? - before;
            site.must_be_empty().await?;
            rates.push(per_second(rows, took));
        }
        lab.progress(format!("{}: {name}: {}/s", site.engine, rate(rates.median())));
        table.push(line(name, &rates, &cpu, rows * rounds));
    }
    page.table(["delete", "rows/s", "database, µs"], &table);
    Ok(())
}

/// Deletes by our store, as so many relays do that have as many lanes each: one after the other its
/// runs of each part of the table.
async fn settle(site: &Site, rows: usize, run: usize, of: usize) -> Result<Duration> {
    let store = site.store()?;
    store.open().await?;
    let numbers: Vec<u64> = (0..rows as u64).collect();
    let mut lists: Vec<Vec<Delivered>> = vec![];
    for part in numbers.chunks(of * LIST) {
        for turn in 0..of {
            let runs = part.chunks(run).skip(turn).step_by(of);
            lists.push(runs.flatten().map(|number| delivered(*number)).collect());
        }
    }
    let began = Instant::now();
    for list in &lists {
        store.settle(Settle::new(list, &[])).await?;
    }
    Ok(began.elapsed())
}

/// The row that the seeding made of this number.
fn delivered(number: u64) -> Delivered {
    let id = RowId::new(Position(number + 1), MessageId::from_bytes(message_id(number)));
    Delivered::new(id, Receipt::default())
}

fn message_id(number: u64) -> [u8; 16] {
    let six = &number.to_be_bytes()[2..];
    let mut id = [0; 16];
    id[..6].copy_from_slice(six);
    id[6..10].copy_from_slice(&[0x70, 0, 0x80, 0]);
    id[10..].copy_from_slice(six);
    id
}

/// The message of the row with this id, as hexadecimal digits.
fn digits(id: u64) -> String {
    message_id(id - 1).map(|byte| format!("{byte:02x}")).concat()
}

fn text(ids: &[u64], form: Form) -> String {
    let list = |one: &dyn Fn(&u64) -> String| ids.iter().map(one).collect::<Vec<_>>().join(",");
    match form {
        Form::Ids(_) | Form::Shuffled | Form::Ours(..) => {
            format!("DELETE FROM outbox WHERE id IN ({})", list(&u64::to_string))
        }
        Form::Range(_) => {
            let (first, last) = (ids.first().unwrap_or(&1), ids.last().unwrap_or(&0));
            format!("DELETE FROM outbox WHERE id BETWEEN {first} AND {last}")
        }
        Form::Listed => {
            let (ids, messages) =
                (list(&u64::to_string), list(&|id| format!("x'{}'", digits(*id))));
            format!("DELETE FROM outbox WHERE id IN ({ids}) AND message_id IN ({messages})")
        }
        Form::Placed => {
            let messages = ids.iter().map(|id| digits(*id)).collect::<String>();
            let (count, first) = (ids.len(), ids.first().unwrap_or(&1));
            format!(
                "DELETE FROM outbox WHERE id IN ({}) \
                 AND message_id = SUBSTR(x'{messages}', 1 + 16 * ((id - {first}) MOD {count}), 16)",
                list(&u64::to_string)
            )
        }
        Form::Pairs => {
            let pair = |id: &u64| format!("({id},x'{}')", digits(*id));
            format!("DELETE FROM outbox WHERE (id, message_id) IN ({})", list(&pair))
        }
    }
}

async fn delete(
    site: &Site,
    rows: usize,
    form: Form,
    connections: usize,
    minimal: bool,
) -> Result<Duration> {
    let mut ids: Vec<u64> = (1..=rows as u64).collect();
    if matches!(form, Form::Shuffled) {
        // Neighbours come apart, but no further than acknowledgements of several partitions do.
        for block in ids.chunks_mut(9_000) {
            let count = block.len();
            let mixed: Vec<u64> = (0..count).map(|index| block[index * 4_001 % count]).collect();
            if mixed.iter().collect::<std::collections::HashSet<_>>().len() == count {
                block.copy_from_slice(&mixed);
            }
        }
    }
    let size = match form {
        Form::Ids(size) | Form::Range(size) => size,
        _ => LIST,
    };
    let texts: Vec<String> = ids.chunks(size).map(|ids| text(ids, form)).collect();
    let mut opened = vec![];
    for _ in 0..connections {
        let mut connection = site.connect().await?;
        if minimal {
            execute(&mut connection, "SET SESSION binlog_row_image = MINIMAL").await?;
        }
        opened.push(connection);
    }
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for (index, mut connection) in opened.into_iter().enumerate() {
        let own: Vec<String> = texts.iter().skip(index).step_by(connections).cloned().collect();
        tasks.spawn(async move {
            for text in own {
                execute(&mut connection, &text).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.context("a delete")??;
    }
    Ok(began.elapsed())
}
