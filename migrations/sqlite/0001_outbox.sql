-- Messages that wait. A row is pending while it exists, the relay deletes delivered ones.
-- Write message_id, topic, message_key, partition_no, headers and payload.
-- AUTOINCREMENT: otherwise the id of the last row is given out again once that row is gone.
-- The large columns come last, because SQLite reads through them to what stands behind.
CREATE TABLE IF NOT EXISTS outbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  message_id BLOB NOT NULL,
  topic TEXT NOT NULL,
  message_key BLOB NULL,
  partition_no INTEGER NULL,
  created_at INTEGER NOT NULL DEFAULT (CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000), -- microseconds since 1970, UTC
  attempts INTEGER NOT NULL DEFAULT 0,
  available_at INTEGER NULL,
  held_at INTEGER NULL,
  last_error BLOB NULL,
  revision INTEGER NOT NULL DEFAULT 0,
  retried INTEGER NOT NULL DEFAULT 0,
  headers BLOB NULL,
  payload BLOB NULL,
  CONSTRAINT outbox_message_id_is_a_uuid
    CHECK (typeof(message_id) = 'blob' AND length(message_id) = 16),
  CONSTRAINT outbox_topic_fits
    CHECK (typeof(topic) = 'text' AND length(CAST(topic AS BLOB)) BETWEEN 1 AND 249),
  CONSTRAINT outbox_partition_fits
    CHECK (partition_no IS NULL
      OR (typeof(partition_no) = 'integer' AND partition_no BETWEEN 0 AND 2147483647)),
  CONSTRAINT outbox_key_fits CHECK (length(CAST(message_key AS BLOB)) <= 1024),
  CONSTRAINT outbox_headers_fit CHECK (length(CAST(headers AS BLOB)) <= 65536),
  CONSTRAINT outbox_payload_fits CHECK (length(CAST(payload AS BLOB)) <= 15728640)
);

-- Messages of the outbox that wait for an operator. Rows that do not cost writers nothing.
CREATE INDEX IF NOT EXISTS outbox_held_message ON outbox (message_id) WHERE held_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS outbox_held_key ON outbox (topic, CAST(message_key AS BLOB))
  WHERE held_at IS NOT NULL;

-- Who may publish. Epochs only grow: the row is never deleted.
CREATE TABLE IF NOT EXISTS outbox_lane (
  lane INTEGER PRIMARY KEY,
  owner BLOB NULL,
  epoch INTEGER NOT NULL DEFAULT 0,
  expires_at INTEGER NOT NULL DEFAULT 0,
  ttl INTEGER NOT NULL DEFAULT 0 -- microseconds
);

INSERT OR IGNORE INTO outbox_lane (lane) VALUES (0);

-- Running dispatchers.
CREATE TABLE IF NOT EXISTS outbox_worker (
  worker BLOB NOT NULL PRIMARY KEY,
  healthy INTEGER NOT NULL,
  seen_at INTEGER NOT NULL,
  ttl INTEGER NOT NULL -- microseconds
);

-- Messages that left the outbox undelivered, in full.
CREATE TABLE IF NOT EXISTS outbox_dead (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  outbox_id INTEGER NOT NULL,
  message_id BLOB NOT NULL,
  topic TEXT NOT NULL,
  message_key BLOB NULL,
  partition_no INTEGER NULL,
  created_at INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  last_error BLOB NULL,
  revision INTEGER NOT NULL,
  retried INTEGER NOT NULL,
  died_at INTEGER NOT NULL,
  headers BLOB NULL,
  payload BLOB NULL
);

CREATE INDEX IF NOT EXISTS outbox_dead_message ON outbox_dead (message_id);
CREATE INDEX IF NOT EXISTS outbox_dead_topic ON outbox_dead (topic);

-- Copies of delivered messages, where the archive is switched on.
CREATE TABLE IF NOT EXISTS outbox_delivered (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  outbox_id INTEGER NOT NULL,
  message_id BLOB NOT NULL,
  topic TEXT NOT NULL,
  message_key BLOB NULL,
  created_at INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  partition_no INTEGER NULL, -- where it went
  offset_no INTEGER NULL, -- where it went
  delivered_at INTEGER NOT NULL,
  headers BLOB NULL,
  payload BLOB NULL,
  UNIQUE (message_id, outbox_id)
);

-- Messages of other services that consumers of this database have accepted.
CREATE TABLE IF NOT EXISTS outbox_inbox (
  consumer TEXT NOT NULL,
  message_id BLOB NOT NULL,
  accepted_at INTEGER NOT NULL,
  PRIMARY KEY (consumer, message_id)
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS outbox_inbox_accepted ON outbox_inbox (accepted_at);

-- The version of these tables, and what tells this database from another one.
CREATE TABLE IF NOT EXISTS outbox_meta (
  one INTEGER PRIMARY KEY,
  schema_version INTEGER NOT NULL,
  server INTEGER NOT NULL
);

-- Last. An error here: one of them is missing, or is a table of somebody else. Give that another
-- name, or ours a prefix, and run this again.
INSERT OR IGNORE INTO outbox_meta (one, schema_version, server)
SELECT 1, 1, random()
WHERE EXISTS (
    SELECT lane, owner, epoch, expires_at, ttl FROM outbox_lane WHERE lane = 0)
  AND NOT EXISTS (
    SELECT id, message_id, topic, message_key, partition_no, created_at, attempts, available_at,
      held_at, last_error, revision, retried, headers, payload
    FROM outbox INDEXED BY outbox_held_message WHERE held_at IS NOT NULL LIMIT 0)
  AND NOT EXISTS (
    SELECT id FROM outbox INDEXED BY outbox_held_key WHERE held_at IS NOT NULL LIMIT 0)
  AND NOT EXISTS (
    SELECT worker, healthy, seen_at, ttl FROM outbox_worker LIMIT 0)
  AND NOT EXISTS (
    SELECT id, outbox_id, message_id, died_at FROM outbox_dead LIMIT 0)
  AND NOT EXISTS (
    SELECT id, outbox_id, message_id, delivered_at FROM outbox_delivered LIMIT 0)
  AND NOT EXISTS (
    SELECT consumer, message_id, accepted_at
    FROM outbox_inbox INDEXED BY outbox_inbox_accepted LIMIT 0);
