//! Holds the shared servers for other processes, until it is ended.
//!
//! Prints the variables that give them to tests; `cargo xtask servers` wraps it.

use integration_tests::{database::Engine, servers, servers::Backend};

#[tokio::main]
async fn main() {
    // Together, as each takes seconds; in the ladder's own words if one cannot be had.
    let (mariadb, mysql, kafka) = tokio::join!(
        servers::database_of(Engine::MariaDb),
        servers::database_of(Engine::MySql),
        servers::kafka(),
    );
    for database in [mariadb, mysql].into_iter().flatten() {
        let variable = Backend::Database(database.engine()).variable();
        println!("export {variable}={}", database.url());
    }
    if let Some(kafka) = kafka {
        println!("export {}={}", Backend::Kafka.variable(), kafka.bootstrap());
    }
    println!("# ready");
    std::future::pending().await
}
