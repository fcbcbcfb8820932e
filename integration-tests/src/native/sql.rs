//! MySQL and MariaDB from Debian's packages.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use super::{
    account::Account,
    cache::{Cache, open_folder},
    debian::Package,
    folder::RunFolder,
    ports,
    server::{Recipe, Server},
    tool,
};
use crate::database::{Engine, OPEN_USER, Options, PASSWORD, USER};

/// A server that has been set up but not started.
pub(crate) fn server(engine: Engine, options: &Options) -> Result<Server> {
    let cache = Cache::open()?;
    let program = Program { engine, root: package(engine).unpacked(&cache)? };
    let template = program.template(&cache)?;
    let folder = RunFolder::new(&cache, engine.name())?;
    tool::run(
        Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(template.join("data"))
            .arg(folder.path()),
    )?;
    let accounts = folder.path().join("accounts.sql");
    let statements = create_account(USER, PASSWORD) + &create_account(OPEN_USER, "");
    fs::write(&accounts, statements)?;
    let port = ports::free()?;
    let mut arguments = program.arguments(&folder.path().join("data"));
    arguments.extend([
        format!("--port={port}"),
        "--bind-address=127.0.0.1".into(),
        // Relative to the data folder: an absolute path can be longer than a socket's may be.
        "--socket=server.sock".into(),
        "--pid-file=server.pid".into(),
        format!("--init-file={}", accounts.display()),
        // All tests of a process share a server, each with pools of its own.
        "--max-connections=1000".into(),
    ]);
    if let Some(identity) = options.identity() {
        for (name, pem) in [("cert", &identity.certificate), ("key", &identity.key)] {
            let file = folder.path().join(name).with_extension("pem");
            fs::write(&file, pem)?;
            Account::unprivileged().own(&file)?;
            arguments.push(format!("--ssl-{name}={}", file.display()));
        }
    }
    arguments.extend(options.arguments());
    Ok(Server::new(Recipe {
        name: engine.name().into(),
        port,
        program: program.loader(),
        arguments,
        ready: "ready for connections",
        folder,
    }))
}

fn package(engine: Engine) -> Package {
    match engine {
        Engine::MariaDb => Package { suite: "bookworm", name: "mariadb-server-core" },
        // MySQL is in no released suite.
        Engine::MySql => Package { suite: "sid", name: "mysql-server-core" },
    }
}

/// One statement a line, as MariaDB's init file wants it.
fn create_account(user: &str, password: &str) -> String {
    format!(
        "CREATE USER IF NOT EXISTS '{user}'@'%' IDENTIFIED BY '{password}';\n\
         GRANT ALL ON *.* TO '{user}'@'%' WITH GRANT OPTION;\n"
    )
}

/// The unpacked server program.
struct Program {
    engine: Engine,
    root: PathBuf,
}

impl Program {
    /// The dynamic loader of its own Debian release, which runs it whatever libc the machine has.
    fn loader(&self) -> PathBuf {
        self.root.join("usr/lib64/ld-linux-x86-64.so.2")
    }

    fn arguments(&self, data: &Path) -> Vec<String> {
        let usr = self.root.join("usr");
        let usr = usr.display();
        let binary = match self.engine {
            Engine::MariaDb => "mariadbd",
            Engine::MySql => "mysqld",
        };
        let mut arguments = vec![
            "--library-path".into(),
            format!("{usr}/lib/x86_64-linux-gnu"),
            format!("{usr}/sbin/{binary}"),
            "--no-defaults".into(),
            format!("--basedir={usr}"),
            format!("--lc-messages-dir={usr}/share/mysql"),
            format!("--character-sets-dir={usr}/share/mysql/charsets"),
            format!("--plugin-dir={usr}/lib/mysql/plugin"),
            format!("--datadir={}", data.display()),
        ];
        if self.engine == Engine::MySql {
            // Debian's default is a folder that only its installed package has.
            arguments.extend(["--secure-file-priv=NULL".into(), "--mysqlx=OFF".into()]);
        }
        arguments
    }

    /// A data folder as the server initialises it, made once and copied for every new server.
    fn template(&self, cache: &Cache) -> Result<PathBuf> {
        let name = self.root.file_name().unwrap_or_default().to_string_lossy();
        cache.once(&format!("{name}-data"), |folder| {
            let data = folder.join("data");
            open_folder(&data)?;
            Account::unprivileged().own(&data)?;
            match self.engine {
                Engine::MySql => self.initialise_mysql(&data)?,
                Engine::MariaDb => self.bootstrap_mariadb(&data)?,
            }
            // The identity of a server, which each copy makes up for itself.
            let _ = fs::remove_file(data.join("auto.cnf"));
            Ok(())
        })
    }

    fn initialise_mysql(&self, data: &Path) -> Result<()> {
        let mut server = Command::new(self.loader());
        server.args(self.arguments(data)).arg("--initialize-insecure");
        tool::run(Account::unprivileged().run(&mut server))?;
        Ok(())
    }

    /// What `mariadb-install-db` does, whose helper programs are in other packages.
    fn bootstrap_mariadb(&self, data: &Path) -> Result<()> {
        let system = data.join("mysql");
        open_folder(&system)?;
        Account::unprivileged().own(&system)?;
        let mut statements = String::from("use mysql;\nset @auth_root_socket=NULL;\n");
        for file in [
            "mysql_system_tables",
            "mysql_performance_tables",
            "mysql_system_tables_data",
            "maria_add_gis_sp_bootstrap",
            "mysql_sys_schema",
        ] {
            let path = self.root.join("usr/share/mysql").join(file).with_extension("sql");
            statements += &fs::read_to_string(path)?;
        }
        let bootstrap = data.with_file_name("bootstrap.sql");
        fs::write(&bootstrap, statements)?;
        let mut server = Command::new(self.loader());
        server
            .args(self.arguments(data))
            .args(["--bootstrap", "--silent-startup", "--enforce-storage-engine="])
            .arg("--log-warnings=0")
            .stdin(fs::File::open(&bootstrap)?);
        let output = Account::unprivileged().run(&mut server).output()?;
        ensure!(
            output.status.success(),
            "MariaDB's bootstrap failed:\n{}",
            tool::tail(&String::from_utf8_lossy(&output.stderr))
        );
        Ok(())
    }
}
