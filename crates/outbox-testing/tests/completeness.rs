//! Each conformance case is emitted by its macro: one that is left out would never run.

const STORE: &str = include_str!("../src/conformance/store.rs");
const BROKER: &str = include_str!("../src/conformance/broker.rs");

#[test]
fn the_macros_emit_every_case() {
    let groups = [
        (STORE, include_str!("../src/conformance/store/visibility.rs")),
        (STORE, include_str!("../src/conformance/store/claiming.rs")),
        (STORE, include_str!("../src/conformance/store/leasing.rs")),
        (STORE, include_str!("../src/conformance/store/settling.rs")),
        (STORE, include_str!("../src/conformance/store/purging.rs")),
        (STORE, include_str!("../src/conformance/store/dead_letters.rs")),
        (STORE, include_str!("../src/conformance/store/reference.rs")),
        (BROKER, include_str!("../src/conformance/broker/answering.rs")),
        (BROKER, include_str!("../src/conformance/broker/recording.rs")),
    ];
    for (suite, group) in groups {
        let cases = group.lines().filter_map(|line| line.strip_prefix("pub async fn "));
        let cases: Vec<&str> = cases.filter_map(|rest| rest.split('<').next()).collect();
        assert!(!cases.is_empty());
        for case in cases {
            assert!(suite.contains(&format!("            {case},\n")), "{case} is never run");
        }
    }
}
