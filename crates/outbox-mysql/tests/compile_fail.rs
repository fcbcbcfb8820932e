//! What the compiler refuses.

#[test]
fn a_message_is_never_added_through_a_pool() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
