//! `cargo xtask <command>`: everything a developer runs besides `cargo test`.

mod cargo;
mod commands;

use std::{env, process::ExitCode};

use commands::COMMANDS;

fn main() -> ExitCode {
    let mut words = env::args().skip(1);
    let name = words.next().unwrap_or_else(|| "help".into());
    let arguments: Vec<String> = words.collect();
    if matches!(name.as_str(), "help" | "--help" | "-h") {
        print!("{}", list());
        return ExitCode::SUCCESS;
    }
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        eprint!("no command is named {name:?}\n\n{}", list());
        return ExitCode::FAILURE;
    };
    let takes_none = command.usage == command.name;
    if takes_none && let Some(argument) = arguments.first() {
        eprintln!("{name} takes no {argument:?}: {}", command.about);
        return ExitCode::FAILURE;
    }
    match (command.run)(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn list() -> String {
    let lines = COMMANDS.iter().map(|it| format!("  cargo xtask {:<34} {}\n", it.usage, it.about));
    std::iter::once("Besides `cargo test`:\n".to_owned()).chain(lines).collect()
}
