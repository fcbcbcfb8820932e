//! The tests that the pages in `docs` name exist.

use std::{collections::HashSet, fs, path::Path};

use anyhow::{Result, ensure};

use super::Outcome;
use crate::cargo::workspace;

pub(super) fn check() -> Result<Outcome> {
    let mut functions = HashSet::new();
    for folder in ["crates", "integration-tests", "examples"] {
        collect(&workspace().join(folder), &mut functions)?;
    }
    let mut missing = vec![];
    for page in fs::read_dir(workspace().join("docs"))? {
        let path = page?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            let text = fs::read_to_string(&path)?;
            let named = sentences(&text).chain(last_column(&text));
            let absent = named.filter(|name| !functions.contains(*name));
            missing.extend(absent.map(|name| format!("{name} ({})", path.display())));
        }
    }
    ensure!(missing.is_empty(), "no such test: {}", missing.join(", "));
    Ok(Outcome::Passed)
}

/// The words in back quotes that read like the name of a test: a sentence of five words or more.
fn sentences(page: &str) -> impl Iterator<Item = &str> {
    page.lines().flat_map(|line| names_of(line, 5))
}

/// The names in the last columns of tables that say there which tests they name: however short.
fn last_column(page: &str) -> impl Iterator<Item = &str> {
    let mut tests = false;
    page.lines().flat_map(move |line| {
        let last = line.strip_suffix('|').and_then(|row| row.rsplit('|').next());
        tests = match last.map(str::trim) {
            Some("caught by" | "tests") => true,
            Some(_) => tests,
            None => false,
        };
        names_of(last.filter(|_| tests).unwrap_or_default(), 2)
    })
}

/// The names in back quotes of so many words or more. Those that begin with `outbox_` are metrics and
/// tables.
fn names_of(text: &str, words: usize) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(move |name| {
        let part_of_a_name =
            |byte: u8| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let long = name.split('_').count() >= words && !name.starts_with("outbox_");
        long && name.bytes().all(part_of_a_name)
    })
}

/// The names of all functions below the folder, and of modules: a test of several servers is one.
fn collect(folder: &Path, functions: &mut HashSet<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, functions)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            functions.extend(names(&fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

fn names(source: &str) -> impl Iterator<Item = String> {
    source.lines().filter_map(|line| {
        let named = ["fn ", "mod "].into_iter().find_map(|word| line.split_once(word));
        Some(named?.1.split(['(', '<', ' ', ';']).next()?.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sentences_in_back_quotes_name_tests() {
        let page =
            "| `a_test_that_is_named`, `outbox_a_b_c_d` | `cargo xtask check` a_test_that_is_not |";
        assert_eq!(sentences(page).collect::<Vec<_>>(), ["a_test_that_is_named"]);
    }

    #[test]
    fn tables_of_tests_name_them_however_short() {
        let page = "| x | caught by |\n|---|---|\n| `not_this` | `plain_sql`, `outbox_dead` |\n\n`nor_this`";
        assert_eq!(last_column(page).collect::<Vec<_>>(), ["plain_sql"]);
    }

    #[test]
    fn functions_and_modules_are_found_whatever_stands_before_and_behind_their_names() {
        let source =
            "    pub async fn one<F: Fixture>() {\n#[test]\nfn two() {\nlet x = 1;\nmod three {";
        assert_eq!(names(source).collect::<Vec<_>>(), ["one", "two", "three"]);
    }
}
