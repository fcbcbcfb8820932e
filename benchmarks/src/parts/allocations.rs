//! How often memory is allocated for a message, in a build whose allocator counts.

use anyhow::{Result, ensure};

use super::drain::{USUAL, filled, overlapped};
use crate::{cpu, lab::Lab, report::Page, site::Site};

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    ensure!(cpu::COUNTS, "nothing is counted: `cargo xtask bench allocations` builds what counts");
    let rows = lab.pick(20_000, 500_000);
    let mut page = Page::new("Allocations");
    page.say(format!(
        "How often memory is allocated, and how many bytes in all, for each of {rows} messages of \
         1 KiB that are drained: by everything that is Rust in the process, librdkafka's own memory \
         left out. What the raw stages need as well (read, produce and delete overlapped, without \
         order per key, lease or retry) is sqlx and the handing to librdkafka; the rest is ours. \
         Two drains each, the second is counted."
    ));
    for engine in lab.engines() {
        let (site, kafka) = (Site::new(lab, engine).await?, lab.kafka().await?);
        let mut table = vec![];
        for _ in 0..2 {
            let ours = filled(lab, &site, kafka, rows).await?.1;
            let raw = overlapped(lab, &site, kafka, rows, 1, USUAL).await?.1;
            let each = |amount: f64| format!("{:.1}", amount / rows as f64);
            let cells = |name: &str, allocations: f64, bytes: f64| {
                [engine.to_string(), name.to_owned(), each(allocations), each(bytes)]
            };
            table = vec![
                cells("relay", ours.allocations, ours.bytes),
                cells("raw stages", raw.allocations, raw.bytes),
                cells("ours", ours.allocations - raw.allocations, ours.bytes - raw.bytes),
            ];
            lab.progress(format!("{engine}: {} and {} a message", table[0][2], table[1][2]));
        }
        page.table(["", "by", "allocations", "bytes"], &table);
    }
    Ok(page)
}
