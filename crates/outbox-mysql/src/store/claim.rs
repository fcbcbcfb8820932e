//! Reads rows: page, sweep, look at open transactions, fetch, watch, scan, in one packet.
//!
//! Without a transaction every statement has a snapshot of its own, taken when it starts: so the
//! sweep, which comes after the page, sees whatever was committed when the page was read.

use outbox_core::delivery::{Lane, Position, RowId, Span};
use outbox_core::message::MessageId;
use outbox_core::store::{Claim, ClaimReply, Page, StoreError, StoreErrorKind, Watched};
use sqlx::mysql::MySqlRow;

use super::row::{self, LastTopic, read_state, read_swept};
use crate::tables::Tables;
use crate::text::{self, LIST, List};

/// A span up to this wide is listed id by id.
const LISTED_WIDTH: u64 = 32;

/// So many ranges fit one statement before its planning costs more than its reading.
const RANGES: usize = 100;

/// Dirty reads for the next statement alone: without SESSION it ends with that statement.
const OPEN_LOOK: &str = "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED";

/// The packet of a claim, and what each of its answers is.
pub(super) struct Plan {
    pub(super) packet: String,
    pub(super) parts: Vec<Part>,
}

/// What a statement of the packet answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Page,
    Sweep,
    Set,
    Open,
    Fetch,
    Watch,
    Scan,
    Newest,
}

impl Plan {
    /// The plan for a store of so many lanes; 0 when that is not known yet.
    pub(super) fn new(tables: &Tables, lanes: u16, claim: &Claim<'_>) -> Self {
        let mut plan = Self { packet: String::new(), parts: Vec::new() };
        if let Some(page) = &claim.page {
            plan.add(Part::Page, &page_sql(tables, lanes, page, claim.bytes));
        }
        for condition in conditions(claim.sweep) {
            plan.add(Part::Sweep, &place_sql(tables, &condition));
        }
        for condition in conditions(claim.open) {
            plan.add(Part::Set, OPEN_LOOK);
            let look = format!("SELECT id, lane FROM {} WHERE {condition}", by_id(tables));
            plan.add(Part::Open, &look);
        }
        let limit = (claim.fetch.len() > 1).then(|| claim.bytes / claim.fetch.len());
        for ids in claim.fetch.chunks(LIST) {
            let columns = row::columns("o", limit);
            let ids = List(ids);
            plan.add(
                Part::Fetch,
                &format!("SELECT o.id, {columns} FROM {} WHERE o.id IN ({ids})", by_id(tables)),
            );
        }
        for ids in claim.watch.chunks(LIST) {
            let state = row::state("o");
            let ids = List(ids);
            plan.add(
                Part::Watch,
                &format!(
                    "SELECT o.id, o.message_id, {state} FROM {} WHERE o.id IN ({ids})",
                    by_id(tables)
                ),
            );
        }
        if let Some(page) = &claim.scan {
            plan.add(Part::Scan, &scan_sql(tables, page));
        }
        if let Some(above) = claim.newest {
            plan.add(Part::Newest, &newest_sql(tables, above));
        }
        if plan.parts.is_empty() {
            // An empty statement is an error.
            plan.add(Part::Set, "DO 0");
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

/// The next page. Rows of other lanes are passed as bare ids, so that they are no holes: of all rows
/// only id and lane are read, and the wanted ones are joined to them. Without other lanes it is one
/// scan.
fn page_sql(tables: &Tables, all_lanes: u16, page: &Page<'_>, bytes: usize) -> String {
    let columns = row::columns("o", Some(bytes / page.rows.max(1)));
    let outbox = &tables.outbox;
    let Page { after, through, rows, lanes, .. } = page;
    let wanted = lane_list(lanes);
    if lanes.len() == usize::from(all_lanes) {
        format!(
            "SELECT o.id, {columns} FROM {outbox} o FORCE INDEX (PRIMARY) \
             WHERE o.id > {after} AND o.id <= {through} ORDER BY o.id LIMIT {rows}"
        )
    } else if *through == Position(u64::MAX) {
        // Null is the id of no row. Were the lane compared beside the ids, MySQL would read all rows,
        // contents too, before it compares.
        format!(
            "SELECT p.id, {columns} FROM {outbox} p FORCE INDEX (PRIMARY) \
             LEFT JOIN {outbox} o FORCE INDEX (PRIMARY) \
               ON o.id = IF(p.lane IN ({wanted}), p.id, NULL) \
             WHERE p.id > {after} ORDER BY p.id LIMIT {rows}"
        )
    } else {
        format!(
            "SELECT o.id, {columns} FROM {outbox} o FORCE INDEX (PRIMARY) \
             WHERE o.id > {after} AND o.id <= {through} AND o.lane IN ({wanted}) \
             ORDER BY o.id LIMIT {rows}"
        )
    }
}

/// The outbox, read by its primary key. Where few rows are left servers would rather read the whole
/// table, with all that was deleted and not yet purged. For ids alone MySQL reads the whole index even
/// so: whoever wants ids asks for the lane as well, which is in no index.
fn by_id(tables: &Tables) -> String {
    format!("{} o FORCE INDEX (PRIMARY)", tables.outbox)
}

fn place_sql(tables: &Tables, condition: &str) -> String {
    let size = row::size("o");
    format!("SELECT o.id, o.lane, {size} FROM {} WHERE {condition}", by_id(tables))
}

fn scan_sql(tables: &Tables, page: &Page<'_>) -> String {
    let Page { after, through, rows, lanes, .. } = page;
    let lanes = lane_list(lanes);
    let condition = format!("o.id > {after} AND o.id <= {through} AND o.lane IN ({lanes})");
    place_sql(tables, &format!("{condition} ORDER BY o.id LIMIT {rows}"))
}

/// The end of the index, read downwards, and not below what was passed: there, rows that were
/// deleted and not yet purged may lie by the million.
fn newest_sql(tables: &Tables, above: Position) -> String {
    let condition = format!("o.id > {above} ORDER BY o.id DESC LIMIT 1");
    format!("SELECT o.id, o.lane FROM {} WHERE {condition}", by_id(tables))
}

/// An `IN` list must not be empty; no row is in the lane that a SMALLINT cannot hold.
fn lane_list(lanes: &[Lane]) -> String {
    if lanes.is_empty() { "65536".to_owned() } else { List(lanes).to_string() }
}

/// Spans as conditions on the primary key: narrow ones as lists, wide ones as ranges.
fn conditions(spans: &[Span]) -> Vec<String> {
    let (narrow, wide): (Vec<&Span>, Vec<&Span>) =
        spans.iter().partition(|span| span.last.0.saturating_sub(span.first.0) < LISTED_WIDTH);
    let ids: Vec<u64> = narrow.iter().flat_map(|span| span.first.0..=span.last.0).collect();
    let lists = ids.chunks(LIST).map(|ids| format!("id IN ({})", List(ids)));
    let ranges = wide.chunks(RANGES).map(|spans| {
        let arms = spans.iter().map(|span| format!("id BETWEEN {} AND {}", span.first, span.last));
        arms.collect::<Vec<_>>().join(" OR ")
    });
    lists.chain(ranges).collect()
}

/// Makes a reply of the rows of a claim, as they come.
pub(super) struct Reading<'a> {
    page: Option<&'a Page<'a>>,
    parts: Vec<Part>,
    page_rows: usize,
    topics: LastTopic,
    reply: ClaimReply,
}

impl<'a> Reading<'a> {
    pub(super) fn new(claim: &'a Claim<'_>, parts: Vec<Part>, server: u64) -> Self {
        let page = claim.page.as_ref();
        let mut reply = ClaimReply::default();
        reply.server = server;
        if let Some(page) = page {
            reply.covered = page.after;
        }
        Self { page, parts, page_rows: 0, topics: LastTopic::default(), reply }
    }

    /// A row that this part answered.
    pub(super) fn row(&mut self, part: usize, row: &MySqlRow) -> Result<(), StoreError> {
        let reply = &mut self.reply;
        match self.parts.get(part) {
            None | Some(Part::Set) => {}
            Some(Part::Page) => {
                // Everything but the id is null in rows of other lanes.
                let position = Position(text::number(row, 0)?);
                self.page_rows += 1;
                reply.covered = position;
                match text::bytes(row, 1)? {
                    Some(_) => reply.rows.push(row::read(row, &mut self.topics)?),
                    None => reply.passed.push(position),
                }
            }
            Some(Part::Fetch) => reply.rows.push(row::read(row, &mut self.topics)?),
            Some(Part::Sweep) => reply.swept.push(read_swept(row)?),
            Some(Part::Scan) => reply.scanned.push(read_swept(row)?),
            Some(Part::Open) => reply.open.push(Position(text::number(row, 0)?)),
            Some(Part::Newest) => reply.newest = Some(Position(text::number(row, 0)?)),
            Some(Part::Watch) => {
                let id = MessageId::from_bytes(text::id(row, 1)?);
                let id = RowId::new(Position(text::number(row, 0)?), id);
                reply.watched.push(Watched::new(id, read_state(row, 2)?));
            }
        }
        Ok(())
    }

    /// The reply, once so many parts have answered.
    pub(super) fn end(mut self, answers: usize) -> Result<ClaimReply, StoreError> {
        if answers != self.parts.len() {
            return Err(StoreErrorKind::Other.into());
        }
        self.reply.end = self.page.is_some_and(|page| self.page_rows < page.rows);
        Ok(self.reply)
    }
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
        let spans = [span(5, 6), span(100, 1_000_000), span(9, 9), span(2_000_000, 2_000_099)];
        assert_eq!(
            conditions(&spans),
            ["id IN (5,6,9)", "id BETWEEN 100 AND 1000000 OR id BETWEEN 2000000 AND 2000099"]
        );
    }

    #[test]
    fn lists_stay_below_a_thousand() {
        let spans: Vec<Span> = (0..500).map(|n| span(n * 100, n * 100 + 9)).collect();
        let conditions = conditions(&spans);
        assert_eq!(conditions.len(), 6);
        assert!(conditions.iter().all(|list| list.matches(',').count() < 1_000));
    }

    #[test]
    fn the_sweep_follows_the_page_and_the_open_look_the_sweep() {
        let spans = [span(1, 2)];
        let claim = Claim::new(1_000).open(&spans).sweep(&spans).page(Page::new(
            &[Lane(0)],
            Position(7),
            10,
        ));
        let plan = Plan::new(&Tables::new(), 16, &claim);
        assert_eq!(plan.parts, [Part::Page, Part::Sweep, Part::Set, Part::Open]);
    }
}
