//! What the relay costs and reaches, beside the limits measured in the same run.
//!
//! `cargo xtask bench [--quick] [part ...] [mariadb|mysql]` builds and runs it. Each part writes a
//! page.

mod cpu;
mod delay;
mod lab;
mod loops;
mod parts;
mod plot;
mod raw;
mod relay;
mod report;
mod site;
mod stats;
mod writers;

use std::{env, path::PathBuf};

use anyhow::{Context, Result, bail};

use integration_tests::database::Engine;

use crate::{
    lab::{Lab, Size},
    parts::{ALLOCATIONS, PARTS, memory},
};

/// As in the relay of the examples. Both sides of a comparison have it.
#[cfg(not(feature = "allocations"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[cfg(feature = "allocations")]
#[global_allocator]
static ALLOCATOR: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

#[tokio::main]
async fn main() -> Result<()> {
    let mut words: Vec<String> = env::args().skip(1).collect();
    if let [memory::RELAY, url, bootstrap] =
        words.iter().map(String::as_str).collect::<Vec<_>>()[..]
    {
        return memory::relay(url, bootstrap).await;
    }
    let folder = words.iter().position(|word| word == "--into").map(|at| words.drain(at..at + 2));
    let folder = folder.and_then(|mut pair| pair.nth(1)).context("--into <folder> is missing")?;
    let folder = PathBuf::from(folder);
    let quick = words.iter().any(|word| word == "--quick");
    let command = [vec!["cargo xtask bench".to_owned()], words.clone()].concat().join(" ");
    words.retain(|word| word != "--quick");
    let mut engines: Vec<Engine> =
        Engine::ALL.into_iter().filter(|engine| words.iter().any(|w| w == engine.name())).collect();
    words.retain(|word| Engine::ALL.iter().all(|engine| engine.name() != word));
    if engines.is_empty() {
        engines.extend(if quick { &Engine::ALL[..1] } else { &Engine::ALL[..] });
    }
    let names: Vec<&str> = PARTS.iter().map(|part| part.name).collect();
    if let Some(word) = words.iter().find(|word| PARTS.iter().all(|part| part.name != **word)) {
        bail!("no part is named {word:?}; there are: {}", names.join(", "));
    }
    let lab = Lab::new(if quick { Size::Quick } else { Size::Full }, engines);
    for part in PARTS {
        let everything = words.is_empty() && part.name != ALLOCATIONS;
        if !everything && !words.iter().any(|word| word == part.name) {
            continue;
        }
        lab.progress(format!("== {}", part.name));
        let page = (part.run)(&lab).await.with_context(|| part.name)?;
        page.write(&folder, part.name, &lab.conditions(&command))?;
        // After each part: a run may be ended early.
        let summary = report::summarise(&folder, &names)?;
        lab.progress(format!("{} is in {}", part.name, summary.display()));
    }
    Ok(())
}
