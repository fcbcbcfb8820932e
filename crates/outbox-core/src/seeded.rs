//! Defects that prove the tests can fail: compiled only with `--cfg outbox_seeded_bug`, chosen at
//! run time. Never a cargo feature.

/// Whether the named defect is switched on. Always false without `--cfg outbox_seeded_bug`.
macro_rules! seeded {
    ($name:literal) => {{
        #[cfg(outbox_seeded_bug)]
        let on = crate::seeded::chosen($name);
        #[cfg(not(outbox_seeded_bug))]
        let on = false;
        on
    }};
}

pub(crate) use seeded;

/// Every defect of the machine, and what it does.
#[cfg(outbox_seeded_bug)]
pub const BUGS: &[(&str, &str)] = &[
    ("publish-before-sweep", "a page is published, late ids below it are read some claims later"),
    ("high-water-mark", "ids below the position are never swept"),
    ("unread-rows-bar-nothing", "rows pass late ones of their lane that were seen and not read"),
    ("open-rows-are-no-holes", "the grace time closes holes though a transaction is still open"),
    ("a-shown-row-is-no-row", "a page counts though a look showed an older row that was not swept"),
    ("no-catch-up", "lanes gained later start where the pages of the others have come"),
    ("no-catch-up-after-a-hand-over", "so do lanes whose hand-over was called off"),
    ("no-gate", "several messages of a key are outstanding"),
    ("failed-rows-go-last", "a failed message goes behind later ones of its key"),
    ("hold-forgotten", "what the store says about held rows is not taken in"),
    ("heads-are-not-read-again", "what operators decide is never noticed"),
    ("forget-on-settle", "settled rows are forgotten while a claim may bring them in again"),
    ("unclear-settle-is-done", "a settle whose answer was lost counts as done"),
    ("settled-before-the-answer", "rows are deleted when they are handed to the broker"),
    ("timeout-is-delivered", "a message whose outcome is unknown counts as delivered"),
    ("timeout-counts", "a timeout counts as an attempt"),
    ("outage-counts", "an attempt is counted while the broker is unavailable"),
    ("answers-shifted", "answers are taken for the next message of the batch"),
    ("no-watchdog", "messages that are never answered stay outstanding"),
    ("unbounded-in-flight", "the cap of rows in flight is ignored"),
    ("reserve-without-end", "rows that others wait for are read however many are held already"),
    ("circuit-stays-open", "nothing closes the circuit while there are lanes"),
    ("deadline-after-the-reply", "a lease is counted from the answer, not from the request"),
    ("publish-past-the-deadline", "messages are sent that cannot be decided under the lease"),
    ("hand-over-without-draining", "a lane is given up while its messages are at the broker"),
    ("release-before-the-answers", "a shutdown releases lanes before outcomes are known"),
    ("sick-worker-keeps-its-lanes", "a worker whose broker is dead calls itself healthy"),
    ("late-rows-without-a-sweep", "rows that a sweep found are published before the next sweep"),
    ("a-backlog-is-old", "ids never seen are given up at once where larger ones are known"),
    ("idle-workers-are-invisible", "workers without lanes do not count, so none is handed to them"),
];

#[cfg(outbox_seeded_bug)]
std::thread_local! {
    static CHOSEN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

#[cfg(outbox_seeded_bug)]
pub(crate) fn chosen(name: &str) -> bool {
    debug_assert!(BUGS.iter().any(|(listed, _)| *listed == name), "{name} is not listed");
    CHOSEN.get().or_else(|| EVERYWHERE.get().copied()) == Some(name)
}

#[cfg(outbox_seeded_bug)]
static EVERYWHERE: std::sync::OnceLock<&'static str> = std::sync::OnceLock::new();

/// Switches a defect on, for all threads and for good.
#[cfg(outbox_seeded_bug)]
pub fn choose_everywhere(name: &'static str) {
    _ = EVERYWHERE.set(name);
}

/// Switches a defect on, for this thread.
#[cfg(outbox_seeded_bug)]
pub fn choose(name: Option<&'static str>) {
    CHOSEN.set(name);
}
