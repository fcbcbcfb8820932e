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

#[cfg(outbox_seeded_bug)]
std::thread_local! {
    static CHOSEN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

#[cfg(outbox_seeded_bug)]
pub(crate) fn chosen(name: &str) -> bool {
    CHOSEN.get() == Some(name)
}

/// Switches a defect on, for this thread.
#[cfg(outbox_seeded_bug)]
pub fn choose(name: Option<&'static str>) {
    CHOSEN.set(name);
}
