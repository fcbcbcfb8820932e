//! Whether somebody on the way may read what is published.

use std::net::IpAddr;

/// Whether a protocol that encrypts nothing leads to any server but those on this machine.
pub(crate) fn is_exposed(protocol: &str, bootstrap: &str) -> bool {
    let plaintext = protocol.to_ascii_lowercase().ends_with("plaintext");
    let mut servers = bootstrap.split(',').map(str::trim).filter(|server| !server.is_empty());
    plaintext && !servers.all(is_loopback)
}

/// A server is `host`, `host:port`, `[address]:port` or `protocol://host:port`.
fn is_loopback(server: &str) -> bool {
    let server = server.split_once("://").map_or(server, |(_, server)| server);
    let host = match server.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => server.rsplit_once(':').map_or(server, |(host, _)| host),
    };
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plaintext_to_another_machine_is_exposed() {
        for bootstrap in ["localhost", "localhost:9092, 127.0.0.1:9093,", "[::1]:9092"] {
            assert!(!is_exposed("plaintext", bootstrap), "{bootstrap}");
        }
        for bootstrap in ["kafka:9092", "localhost:9092,10.0.0.1:9092", "PLAINTEXT://kafka:9092"] {
            assert!(is_exposed("plaintext", bootstrap), "{bootstrap}");
            assert!(is_exposed("SASL_PLAINTEXT", bootstrap), "{bootstrap}");
            assert!(!is_exposed("ssl", bootstrap), "{bootstrap}");
            assert!(!is_exposed("sasl_ssl", bootstrap), "{bootstrap}");
        }
    }
}
