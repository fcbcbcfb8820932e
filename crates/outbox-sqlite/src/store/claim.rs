//! Reads rows: page, sweep, fetch, watch, scan, in one packet.
//!
//! Every statement has a snapshot of its own, taken when it starts: so the sweep, which comes after
//! the page, sees whatever was committed when the page was read. Open transactions cannot be seen.

use outbox_core::delivery::{Position, RowId, Span};
use outbox_core::message::MessageId;
use outbox_core::store::{Claim, ClaimReply, Claimed, Page, StoreError, Watched};
use sqlx::sqlite::SqliteRow;

use super::row::{self, LANE, SIZE, at, read_state, read_swept};
use crate::tables::Tables;
use crate::text::{self, Answer, LIST, List};

/// A span up to this wide is listed id by id.
const LISTED_WIDTH: u64 = 32;

/// So many ranges fit one statement.
const RANGES: usize = 100;

/// The packet of a claim, and what each of its answers is.
pub(super) struct Plan {
    pub(super) packet: String,
    pub(super) parts: Vec<Part>,
}

/// What a statement of the packet answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Server,
    Page,
    Passed,
    Sweep,
    Fetch,
    Watch,
    Scan,
}

impl Plan {
    pub(super) fn new(tables: &Tables, claim: &Claim<'_>) -> Self {
        let mut plan = Self { packet: String::new(), parts: Vec::new() };
        let outbox = &tables.outbox;
        plan.add(Part::Server, &format!("SELECT server FROM {}", tables.meta));
        // The page and the fetch share the budget.
        let whole = claim.fetch.len() == 1;
        let shares = if claim.page.is_some() && claim.fetch.len() > 1 { 2 } else { 1 };
        let bytes = claim.bytes / shares;
        if let Some(page) = &claim.page {
            let place = place(page);
            if page.lanes.contains(&LANE) {
                plan.add(Part::Page, &content_sql(outbox, &place, page.rows, bytes));
            } else if page.through == Position(u64::MAX) {
                plan.add(Part::Passed, &format!("SELECT o.id FROM {outbox} o WHERE {place}"));
            }
        }
        for condition in conditions(claim.sweep) {
            plan.add(
                Part::Sweep,
                &format!("SELECT o.id, {SIZE} FROM {outbox} o WHERE {condition}"),
            );
        }
        for ids in claim.fetch.chunks(LIST) {
            let condition = format!("o.id IN ({})", List(ids.iter().copied().map(at)));
            let sql = if whole {
                format!("SELECT {} FROM {outbox} o WHERE {condition}", row::columns("1"))
            } else {
                let bytes = bytes * ids.len() / claim.fetch.len();
                content_sql(outbox, &condition, ids.len(), bytes)
            };
            plan.add(Part::Fetch, &sql);
        }
        for ids in claim.watch.chunks(LIST) {
            let state = row::state();
            let ids = List(ids.iter().copied().map(at));
            plan.add(
                Part::Watch,
                &format!(
                    "SELECT o.id, o.message_id, {state} FROM {outbox} o WHERE o.id IN ({ids})"
                ),
            );
        }
        if let Some(page) = claim.scan.as_ref().filter(|page| page.lanes.contains(&LANE)) {
            let place = place(page);
            plan.add(Part::Scan, &format!("SELECT o.id, {SIZE} FROM {outbox} o WHERE {place}"));
        }
        plan
    }

    fn add(&mut self, part: Part, statement: &str) {
        if !self.parts.is_empty() {
            self.packet.push(';');
        }
        self.packet += statement;
        self.parts.push(part);
    }
}

/// The next rows `o` above a position.
fn place(page: &Page<'_>) -> String {
    let (after, through, rows) = (at(page.after), at(page.through), page.rows);
    format!("o.id > {after} AND o.id <= {through} ORDER BY o.id LIMIT {rows}")
}

/// At most `rows` rows with their content, as far as the budget goes. Half of it is shared out
/// evenly, so that small rows never wait for a large one before them; the other half goes to
/// whoever comes first. Unordered: SQLite would sort the rows together with their content.
fn content_sql(outbox: &str, place: &str, rows: usize, bytes: usize) -> String {
    let first = bytes / 2;
    let each = first / rows.max(1);
    let columns = row::columns(&format!("(p.size <= {each} OR p.total <= {first})"));
    format!(
        "SELECT {columns} FROM (\
           SELECT id, size, SUM(size) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS total \
           FROM (SELECT o.id, {SIZE} AS size FROM {outbox} o WHERE {place})\
         ) p CROSS JOIN {outbox} o ON o.id = p.id"
    )
}

/// Spans as conditions on the primary key: narrow ones as lists, wide ones as ranges.
fn conditions(spans: &[Span]) -> Vec<String> {
    let (narrow, wide): (Vec<&Span>, Vec<&Span>) =
        spans.iter().partition(|span| span.last.0.saturating_sub(span.first.0) < LISTED_WIDTH);
    let ids: Vec<u64> = narrow.iter().flat_map(|span| span.first.0..=span.last.0).collect();
    let lists = ids.chunks(LIST).map(|ids| format!("o.id IN ({})", List(ids)));
    let range = |span: &&Span| format!("o.id BETWEEN {} AND {}", at(span.first), at(span.last));
    let ranges =
        wide.chunks(RANGES).map(|spans| spans.iter().map(range).collect::<Vec<_>>().join(" OR "));
    lists.chain(ranges).collect()
}

pub(super) fn read(
    claim: &Claim<'_>,
    parts: &[Part],
    answers: Vec<Answer>,
) -> Result<ClaimReply, StoreError> {
    let mut reply = ClaimReply::default();
    if let Some(page) = &claim.page {
        reply.covered = page.after;
        reply.end = true;
    }
    for (part, answer) in parts.iter().zip(answers) {
        let rows = &answer.rows;
        if let (Part::Page | Part::Passed, Some(page)) = (part, &claim.page) {
            reply.end = rows.len() < page.rows;
        }
        for row in rows {
            read_row(*part, row, &mut reply)?;
        }
        if *part == Part::Page {
            reply.rows.sort_unstable_by_key(Claimed::position);
            reply.covered = reply.rows.last().map_or(reply.covered, Claimed::position);
        }
    }
    Ok(reply)
}

fn read_row(part: Part, row: &SqliteRow, reply: &mut ClaimReply) -> Result<(), StoreError> {
    match part {
        Part::Server => reply.server = text::signed(row, 0)?.unwrap_or(0).cast_unsigned(),
        Part::Passed => {
            reply.covered = Position(text::number(row, 0)?);
            reply.passed.push(reply.covered);
        }
        Part::Page | Part::Fetch => reply.rows.push(row::read(row)?),
        Part::Sweep => reply.swept.push(read_swept(row)?),
        Part::Scan => reply.scanned.push(read_swept(row)?),
        Part::Watch => {
            let id = MessageId::from_bytes(text::id(row, 1)?);
            let id = RowId::new(Position(text::number(row, 0)?), id);
            reply.watched.push(Watched::new(id, read_state(row, 2)?));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, last: u64) -> Span {
        Span::new(Position(first), Position(last))
    }

    #[test]
    fn narrow_spans_are_lists_and_wide_ones_ranges() {
        assert_eq!(conditions(&[]), Vec::<String>::new());
        let spans = [span(5, 6), span(100, 1_000_000), span(9, 9), span(2_000_000, u64::MAX)];
        assert_eq!(
            conditions(&spans),
            [
                "o.id IN (5,6,9)",
                "o.id BETWEEN 100 AND 1000000 OR o.id BETWEEN 2000000 AND 9223372036854775807"
            ]
        );
    }

    #[test]
    fn the_sweep_follows_the_page() {
        let spans = [span(1, 2)];
        let page = Page::new(&[LANE], Position(7), 10);
        let claim = Claim::new(1_000).open(&spans).sweep(&spans).page(page);
        assert_eq!(
            Plan::new(&Tables::new(), &claim).parts,
            [Part::Server, Part::Page, Part::Sweep]
        );
    }
}
