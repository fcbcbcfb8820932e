//! The command-line clients of MySQL and MariaDB, from Debian's packages.

use std::process::Command;

use anyhow::Result;

use super::{cache::Cache, debian::Package};
use crate::database::Engine;

/// The engine's own client, which reads no configuration of this machine.
pub(crate) fn client(engine: Engine) -> Result<Command> {
    let (package, binary) = match engine {
        Engine::MariaDb => (Package { suite: "bookworm", name: "mariadb-client-core" }, "mariadb"),
        // MySQL is in no released suite.
        Engine::MySql => (Package { suite: "sid", name: "mysql-client-core" }, "mysql"),
    };
    let usr = package.unpacked(&Cache::open()?)?.join("usr");
    // The loader of its own Debian release, as for the servers.
    let mut client = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
    client
        .arg("--library-path")
        .arg(usr.join("lib/x86_64-linux-gnu"))
        .arg(usr.join("bin").join(binary))
        .arg("--no-defaults");
    Ok(client)
}
