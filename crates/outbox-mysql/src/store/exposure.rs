//! Whether somebody on the way may read what the relay sends.

use std::net::IpAddr;

/// Whether a connection that is not encrypted leaves the machine: to anything but loopback or a
/// socket.
pub(super) fn is_exposed(encrypted: bool, through_socket: bool, host: &str) -> bool {
    !encrypted && !through_socket && !is_loopback(host)
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plaintext_connection_to_another_machine_is_exposed() {
        for host in ["localhost", "LocalHost.", "db.localhost", "127.0.0.1", "127.8.0.1", "::1"] {
            assert!(!is_exposed(false, false, host), "{host}");
        }
        assert!(!is_exposed(false, false, "[::1]"));
        assert!(!is_exposed(false, false, "::ffff:127.0.0.1"));
        for host in ["db", "10.0.0.1", "localhost.example.com", "0.0.0.0", "fe80::1", ""] {
            assert!(is_exposed(false, false, host), "{host}");
            assert!(!is_exposed(true, false, host), "{host}");
            assert!(!is_exposed(false, true, host), "{host}");
        }
    }
}
