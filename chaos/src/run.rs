//! One run: start everything, let faults come, let everything come to rest, and check.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use crate::{
    bug,
    check::{self, Appearance, Befallen, Excuses, Findings},
    consumer::{self, Consumer},
    fault::{Fault, Kind},
    history::{self, Attempt},
    inject::inject,
    options::Options,
    report::{self, Tally},
    schedule::schedule,
    stage::{self, Stage},
    topic::PARTITIONS,
};

const TICK: Duration = Duration::from_millis(500);
const PROGRESS: Duration = Duration::from_secs(5);
/// How long a look may take beside faults.
const LOOK: Duration = Duration::from_secs(2);
/// How long everybody may need to work together at first.
const STARTS: Duration = Duration::from_secs(120);
/// Writers write on for so long when all faults are healed.
const AFTERMATH: Duration = Duration::from_secs(2);
/// How long relays may take to empty the outbox when nobody writes any more.
const DRAINS: Duration = Duration::from_secs(180);

/// Whether nothing was violated.
///
/// # Errors
///
/// When the run could not be made: a server cannot be had or does not come back.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    let Options { length, seed, engine, every, cast, .. } = *options;
    options.bug.as_deref().map_or(Ok(()), bug::choose)?;
    let faults = schedule(seed, length, every, cast);
    println!("chaos: {}", options.command());
    print!("{}", listed(&faults));
    let folder = options.keep.join(format!("{engine}-{seed}-{}", process::id()));
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join("schedule"), listed(&faults))?;
    println!("chaos: {} faults; starting the servers", faults.len());
    let stage = Stage::set(options, &folder).await?;
    let show = Show { stage: Arc::new(stage), folder, began: Instant::now() };
    let played = show.play(options, faults).await;
    let (findings, tally) = match played {
        Ok(played) => played,
        Err(error) => {
            show.keep()?;
            println!("chaos: what was written down is in {}", show.folder.display());
            println!("chaos: again: {}", options.command());
            return Err(error).context("the run could not be made");
        }
    };
    print!("{}", report::figures(&findings, &tally));
    let violations = findings.violations();
    if violations.is_empty() {
        fs::remove_dir_all(&show.folder)?;
    } else {
        show.keep()?;
        violations.iter().for_each(|violation| println!("chaos: VIOLATED: {violation}"));
        println!("chaos: what was written down is in {}", show.folder.display());
        println!("chaos: again: {}", options.command());
    }
    if let Some(folder) = &options.report {
        let path = report::write(folder, options, &show.stage, &findings, &tally)?;
        println!("chaos: the report is in {}", path.display());
    }
    println!("{}", report::summary(options, &findings, &tally));
    Ok(violations.is_empty())
}

fn listed(faults: &[(Duration, Fault)]) -> String {
    faults.iter().fold(String::new(), |mut text, (at, fault)| {
        _ = writeln!(text, "{:>8.1} s  {fault}", at.as_secs_f64());
        text
    })
}

/// A run that has its servers.
struct Show {
    stage: Arc<Stage>,
    folder: PathBuf,
    began: Instant,
}

/// Looks all the time for messages that a fault is blamed on: they are delivered in the end, and gone.
struct Blame {
    most: Arc<AtomicUsize>,
    looks: Arc<AtomicUsize>,
    looking: JoinHandle<()>,
}

impl Blame {
    fn start(stage: &Arc<Stage>) -> Self {
        const COUNT: &str = "SELECT (SELECT COUNT(*) FROM outbox \
            WHERE attempts > 0 OR held_at IS NOT NULL) + (SELECT COUNT(*) FROM outbox_dead)";
        let (most, looks) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let looking = tokio::spawn({
            let (stage, most, looks) = (Arc::clone(stage), Arc::clone(&most), Arc::clone(&looks));
            async move {
                loop {
                    // The database may be down.
                    if let Ok(Ok(count)) = timeout(LOOK, stage.number(COUNT)).await {
                        most.fetch_max(count, Ordering::Relaxed);
                        looks.fetch_add(1, Ordering::Relaxed);
                    }
                    sleep(TICK).await;
                }
            }
        });
        Self { most, looks, looking }
    }

    /// How many there were at the same time at most.
    fn end(self) -> Result<usize> {
        self.looking.abort();
        ensure!(self.looks.load(Ordering::Relaxed) > 10, "nobody looked for attempts");
        Ok(self.most.load(Ordering::Relaxed))
    }
}

/// A fault that was tried: when it began and was healed, if it happened.
type Tried = (Kind, Option<(Instant, Instant)>);

impl Show {
    async fn play(
        &self,
        options: &Options,
        faults: Vec<(Duration, Fault)>,
    ) -> Result<(Findings, Tally)> {
        let stage = &self.stage;
        let consumer =
            Consumer::start(stage.inner_client(), stage.ordered.clone(), PARTITIONS, self.began);
        stage.programs().try_for_each(|program| program.start())?;
        let blame = Blame::start(stage);
        while consumer.read() == 0 {
            ensure!(self.began.elapsed() < STARTS, "nothing was delivered in {STARTS:?}");
            sleep(TICK).await;
        }
        let tried = self.disturb(&consumer, options.length, faults).await?;
        self.until_delivered(&consumer).await?;
        self.say("writers end");
        try_join_all(stage.writers.iter().map(|writer| writer.terminate())).await?;
        let left = self.drain(&consumer).await?;
        let blamed = blame.end()?;
        try_join_all(stage.relays.iter().map(|relay| relay.terminate())).await?;
        self.say("checking");
        let beside =
            Consumer::start(stage.inner_client(), stage.beside.clone(), PARTITIONS, self.began);
        let run = check::Run {
            attempts: self.attempts()?,
            committed: stage.ledger().await?,
            appearances: self.rest_of(consumer, &stage.ordered).await?,
            beside: self.rest_of(beside, &stage.beside).await?,
            beside_created: stage.beside_created.load(Ordering::Relaxed),
            faults: self.befallen(&tried),
            excuses: self.excuses(options.window, &tried),
            left,
            blamed,
            fell: stage.programs().map(|program| program.fell()).sum(),
        };
        let findings = check::judge(&run);
        if !findings.violations().is_empty() {
            self.write_down(&run)?;
        }
        Ok((findings, Tally::of(&tried, run.excuses, self.began.elapsed())))
    }

    /// Lets all faults come and be healed, and the length of the run pass.
    async fn disturb(
        &self,
        consumer: &Consumer,
        length: Duration,
        faults: Vec<(Duration, Fault)>,
    ) -> Result<Vec<Tried>> {
        let (zero, all) = (Instant::now(), faults.len());
        let mut coming = JoinSet::new();
        for (at, fault) in faults {
            let stage = Arc::clone(&self.stage);
            coming.spawn(async move {
                sleep(at).await;
                anyhow::Ok((fault.kind, inject(&stage, fault).await?))
            });
        }
        let mut tried = vec![];
        let mut told = Instant::now();
        while zero.elapsed() < length || !coming.is_empty() {
            tokio::select! {
                Some(ended) = coming.join_next() => tried.push(ended??),
                () = sleep(TICK) => self.watch().await?,
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let records = report::grouped(consumer.read());
                self.say(format!("{records} records, {} of {all} faults are over", tried.len()));
            }
        }
        Ok(tried)
    }

    /// Waits until something is delivered now that everything is healed, or is overdue.
    async fn until_delivered(&self, consumer: &Consumer) -> Result<()> {
        let (healed, read) = (Instant::now(), consumer.read());
        while healed.elapsed() < AFTERMATH
            || (consumer.read() == read && healed.elapsed() < check::LIMIT)
        {
            self.watch().await?;
            sleep(TICK).await;
        }
        Ok(())
    }

    /// Waits until the outbox is empty; how many rows are left when there is no more time.
    async fn drain(&self, consumer: &Consumer) -> Result<usize> {
        let start = Instant::now();
        let mut told = start;
        loop {
            // What a writer sent last may be committed a moment after it ended.
            sleep(TICK).await;
            let left = self.stage.number("SELECT COUNT(*) FROM outbox").await?;
            if (left == 0 && start.elapsed() > AFTERMATH) || start.elapsed() > DRAINS {
                return Ok(left);
            }
            self.watch().await?;
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let records = report::grouped(consumer.read());
                self.say(format!("{records} records, {left} rows to drain"));
            }
        }
    }

    async fn watch(&self) -> Result<()> {
        for program in self.stage.programs() {
            program.watch().await?;
        }
        Ok(())
    }

    async fn rest_of(&self, consumer: Consumer, topic: &str) -> Result<Vec<Appearance>> {
        let client = self.stage.inner_client();
        consumer.end(consumer::ends(client, topic.to_owned(), PARTITIONS).await?).await
    }

    fn attempts(&self) -> Result<Vec<Attempt>> {
        let mut attempts = vec![];
        for writer in 0..self.stage.writers.len() {
            for start in 0..self.stage.writers[writer].lines().len() {
                let path = stage::history(&self.folder, writer, start);
                // One that was killed before it began has none.
                let Ok(text) = fs::read_to_string(&path) else { continue };
                attempts.extend(history::read(&text).with_context(|| path.display().to_string())?);
            }
        }
        Ok(attempts)
    }

    fn befallen(&self, tried: &[Tried]) -> Vec<Befallen> {
        let happened = tried.iter().filter_map(|(kind, times)| Some((kind, (*times)?)));
        let befallen = happened.map(|(kind, (began, healed))| Befallen {
            class: kind.class(),
            began: began - self.began,
            healed: healed - self.began,
        });
        befallen.collect()
    }

    fn excuses(&self, window: usize, tried: &[Tried]) -> Excuses {
        let happened = tried.iter().filter(|(_, times)| times.is_some());
        let count = |beginning| self.stage.relays.iter().map(|it| it.count(beginning)).sum();
        Excuses {
            window,
            faults: happened.map(|(kind, _)| kind.relays_struck(self.stage.cast)).sum(),
            leases_lost: count("lost"),
            ambiguous: count("publish failed: outcome is unknown"),
        }
    }

    /// Keeps what the programs printed, beside the histories.
    fn keep(&self) -> Result<()> {
        for (number, relay) in self.stage.relays.iter().enumerate() {
            for (start, lines) in relay.lines().iter().enumerate() {
                let path = self.folder.join(format!("relay-{number}-{start}.lines"));
                fs::write(path, lines.join("\n"))?;
            }
        }
        Ok(())
    }

    /// Writes down what the checker read.
    fn write_down(&self, run: &check::Run) -> Result<()> {
        let line = |it: &Appearance| {
            let at = it.at.as_secs_f64();
            let entry = it.entry.map(|entry| (entry.aggregate, entry.sequence));
            format!("{at:.3} {} {} {entry:?}\n", it.partition, it.id)
        };
        let text = |all: &[Appearance]| all.iter().map(line).collect::<String>();
        let ledger = run.committed.iter();
        let ledger: String =
            ledger.map(|(id, it)| format!("{id} {} {}\n", it.aggregate, it.sequence)).collect();
        let faults: String = run
            .faults
            .iter()
            .map(|it| format!("{:.3?} to {:.3?} {}\n", it.began, it.healed, it.class))
            .collect();
        let write = |name: &str, text: String| fs::write(Path::join(&self.folder, name), text);
        write("records", text(&run.appearances))?;
        write("records-beside", text(&run.beside))?;
        write("ledger", ledger)?;
        Ok(write("faults", faults)?)
    }

    fn say(&self, what: impl AsRef<str>) {
        println!("[{:>5} s] {}", self.began.elapsed().as_secs(), what.as_ref());
    }
}
