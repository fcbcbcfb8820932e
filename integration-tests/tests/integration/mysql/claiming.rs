//! What a claim reads.

use outbox_core::delivery::Span;

use super::*;

const BYTES: usize = 16 * MEGABYTE;

on_both! {
    async fn a_late_commit_below_the_cursor_is_found_by_the_sweep(lab: Lab) -> Result<()> {
        let mut early = lab.connect().await?;
        let mut tx = early.begin().await?;
        lab.outbox.add(&mut tx, message("early")).await?;
        lab.add(vec![message("late")]).await?;
        let reply = lab.page().await?;
        assert_eq!((reply.rows.len(), reply.covered, reply.end), (1, Position(2), true));
        tx.commit().await?;

        let all = lanes(4);
        let hole = [Span::new(Position(1), Position(1))];
        let page = Page::new(&all, reply.covered, 10);
        let reply = lab.store.claim(Claim::new(BYTES).page(page).sweep(&hole)).await?;
        assert_eq!(reply.rows.len(), 0);
        assert_eq!(reply.swept.len(), 1);
        assert_eq!(reply.swept[0].position, Position(1));
        assert_eq!(reply.swept[0].bytes, "early".len() + "payload".len());

        let fetch = [Position(1)];
        let reply = lab.store.claim(Claim::new(BYTES).fetch(&fetch)).await?;
        assert_eq!(deliveries(reply)[0].message.key(), Some(&b"early"[..]));
        Ok(())
    }

    async fn the_open_look_shows_rows_in_flight_and_not_those_rolled_back(lab: Lab) -> Result<()> {
        let mut flying = lab.connect().await?;
        let mut tx = flying.begin().await?;
        lab.outbox.add(&mut tx, message("flying")).await?;
        let mut gone = lab.connect().await?;
        let mut rolled_back = gone.begin().await?;
        lab.outbox.add(&mut rolled_back, message("gone")).await?;
        rolled_back.rollback().await?;

        let spans = [Span::new(Position(1), Position(2)), Span::new(Position(10), Position(9999))];
        let reply = lab.store.claim(Claim::new(BYTES).open(&spans).sweep(&spans)).await?;
        assert_eq!(reply.open, [Position(1)]);
        assert_eq!(reply.swept, []);
        // The next claim on the same connection reads committed rows again.
        assert_eq!(lab.page().await?.rows.len(), 0);
        assert_eq!(lab.page().await?.rows.len(), 0);
        tx.rollback().await?;
        assert_eq!(lab.store.claim(Claim::new(BYTES).open(&spans)).await?.open, []);
        Ok(())
    }

    async fn rows_of_other_lanes_are_passed_as_positions(lab: Lab) -> Result<()> {
        lab.add((0..40).map(|n| message(&n.to_string())).collect()).await?;
        let all = deliveries(lab.page().await?);
        let wanted = [Lane(1), Lane(3)];
        let page = Page::new(&wanted, Position(5), 20);
        let reply = lab.store.claim(Claim::new(BYTES).page(page)).await?;
        assert_eq!(reply.rows.len() + reply.passed.len(), 20);
        assert_eq!((reply.covered, reply.end), (Position(25), false));
        let expected = |mine: bool| all[5..25].iter().filter(move |d| {
            wanted.contains(&d.lane) == mine
        }).map(|d| d.position);
        let passed: Vec<_> = expected(false).collect();
        assert_eq!(reply.passed, passed);
        let rows: Vec<_> = reply.rows.iter().map(Claimed::position).collect();
        assert_eq!(rows, expected(true).collect::<Vec<_>>());
        assert!(!rows.is_empty() && !passed.is_empty());

        let reply = lab.store.claim(Claim::new(BYTES).page(
            Page::new(&wanted, Position(5), 20).through(Position(25))
        )).await?;
        assert_eq!(reply.rows.iter().map(Claimed::position).collect::<Vec<_>>(), rows);

        let scan = Page::new(&wanted, Position(5), 2);
        let reply = lab.store.claim(Claim::new(BYTES).scan(scan)).await?;
        let scanned: Vec<_> = reply.scanned.iter().map(|row| row.position).collect();
        assert_eq!(scanned, rows[..2]);
        Ok(())
    }

    async fn a_page_after_one_that_did_not_arrive_tells_the_same(lab: Lab) -> Result<()> {
        lab.add((0..40).map(|n| message(&n.to_string())).collect()).await?;
        let wanted = [Lane(1), Lane(3)];
        for rows in [20, 100] {
            let page = || lab.store.claim(Claim::new(BYTES).page(Page::new(&wanted, Position(5), rows)));
            let before = page().await?;
            let told = |reply: ClaimReply| {
                let what = (reply.covered, reply.end, reply.passed.clone());
                let rows = deliveries(reply).into_iter();
                (what, rows.map(|d| (d.position, d.lane, d.state, d.message)).collect::<Vec<_>>())
            };
            let before = told(before);
            let mut polls = 1;
            loop {
                let dropped = outbox_testing::drop_after(polls, page()).await.is_none();
                assert_eq!(told(page().await?), before, "after {polls} polls");
                // On a busy machine a page may be there at the first poll: then it is dropped again.
                match dropped {
                    true => polls += 1,
                    false if polls > 1 => break,
                    false => {}
                }
            }
        }
        Ok(())
    }

    async fn an_empty_page_covers_nothing_more(lab: Lab) -> Result<()> {
        let all = lanes(4);
        let page = Page::new(&all, Position(7), 20);
        let reply = lab.store.claim(Claim::new(BYTES).page(page)).await?;
        assert_eq!((reply.covered, reply.end, reply.rows.len()), (Position(7), true, 0));
        let nothing = lab.store.claim(Claim::new(BYTES)).await?;
        assert_eq!(nothing.rows.len(), 0);
        Ok(())
    }

    async fn content_stays_within_the_byte_budget(lab: Lab) -> Result<()> {
        let large = |key: &str| Message::builder("t").key(key).payload(vec![7; 100_000]).build();
        lab.add(vec![message("small"), large("a")?, message("small"), large("b")?]).await?;
        let all = lanes(4);
        let page = Page::new(&all, Position::START, 10);
        let reply = lab.store.claim(Claim::new(200_000).page(page)).await?;
        let unread: Vec<_> = reply.rows.iter().filter_map(|row| match row {
            Claimed::Unread(row) => Some((row.position, row.bytes)),
            _ => None,
        }).collect();
        assert_eq!(unread, [(Position(2), 100_001), (Position(4), 100_001)]);
        assert_eq!(reply.rows.len(), 4);

        let both = [Position(2), Position(4)];
        let reply = lab.store.claim(Claim::new(200_002).fetch(&both)).await?;
        assert_eq!(deliveries(reply).len(), 2);
        let reply = lab.store.claim(Claim::new(150_000).fetch(&both)).await?;
        assert_eq!(deliveries(reply).len(), 0);
        let reply = lab.store.claim(Claim::new(1).fetch(&both[..1])).await?;
        assert_eq!(deliveries(reply).len(), 1, "a row alone is read whole");
        Ok(())
    }

    async fn a_row_without_a_valid_message_is_a_value(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let rows = [
            "'no such topic', 'k', NULL, NULL", "'t', 'k', NULL, '[[1]]'",
            "'t', 'k', NULL, '[[\"outbox-id\", \"x\"]]'", "'t', 'k', NULL, '{'",
        ];
        for row in rows {
            run(&mut connection, format!(
                "INSERT INTO outbox (message_id, topic, message_key, partition_no, headers) \
                 VALUES (x'00112233445566778899aabbccddeeff', {row})"
            )).await?;
        }
        lab.add(vec![message("fine")]).await?;
        let reply = lab.page().await?;
        let unreadable: Vec<_> = reply.rows.iter().filter_map(|row| match row {
            Claimed::Unreadable(row) => Some(row),
            _ => None,
        }).collect();
        assert_eq!(unreadable.len(), rows.len());
        assert_eq!(unreadable[0].topic, "no such topic");
        assert_eq!(unreadable[0].key, Some(b"k".to_vec()));
        assert_eq!(unreadable[0].id.message.as_bytes()[15], 0xff);
        assert_eq!(deliveries(reply).len(), 1);
        Ok(())
    }

    async fn thousands_of_swept_ids_and_hundreds_of_spans_are_read(lab: Lab) -> Result<()> {
        lab.add((0..3000).map(|n| message(&n.to_string())).collect()).await?;
        let narrow: Vec<_> =
            (0..400).map(|n| Span::new(Position(n * 5 + 1), Position(n * 5 + 4))).collect();
        let wide: Vec<_> = (0..10).map(|n| {
            Span::new(Position(2001 + n * 100), Position(2000 + n * 100 + 90))
        }).collect();
        let spans: Vec<_> = narrow.into_iter().chain(wide).collect();
        let reply = lab.store.claim(Claim::new(BYTES).sweep(&spans).open(&spans)).await?;
        assert_eq!(reply.swept.len(), 400 * 4 + 10 * 90);
        assert_eq!(reply.open.len(), reply.swept.len());
        Ok(())
    }
}
