-- Everything outsiders read, and the ledger that the sync runs on. All times are UTC.

CREATE TABLE meta (
    singleton   boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    partitions  integer NOT NULL CHECK (partitions BETWEEN 1 AND 1024),
    ticks       bigint NOT NULL DEFAULT 0,
    tidied_at   timestamptz
);
COMMENT ON COLUMN meta.partitions IS 'The number of event streams, fixed at first start.';
COMMENT ON COLUMN meta.ticks IS 'The highest tick that Redis counted: a lower one later means that Redis went back.';

CREATE TABLE connectors (
    id               uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id        text NOT NULL CHECK (tenant_id <> ''),
    name             text NOT NULL CHECK (name <> ''),
    external_ref     text,
    region           text,
    base_url         text NOT NULL,
    status           text NOT NULL DEFAULT 'pending'
                     CHECK (status IN ('pending', 'connected', 'degraded', 'disconnected', 'paused', 'deleted')),
    status_reason    text,
    status_since     timestamptz NOT NULL DEFAULT now(),
    action           text NOT NULL DEFAULT 'none',
    hint             text,
    workspace_id     text,
    plan             text,
    version          bigint NOT NULL DEFAULT 0,
    poll_interval_s  integer NOT NULL DEFAULT 900 CHECK (poll_interval_s > 0),
    next_sync_at     timestamptz,
    last_synced_at   timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    deleted_at       timestamptz,
    sealed_key       text,
    key_fingerprint  text,
    cost_since       date,
    partition        integer NOT NULL,
    last_polled_at   timestamptz,
    strikes          integer NOT NULL DEFAULT 0,
    strike_run       uuid,
    suspect_since    timestamptz,
    probes           integer NOT NULL DEFAULT 0,
    backfilled_at    timestamptz,
    reconciled_at    timestamptz
);
COMMENT ON COLUMN connectors.version IS 'Number (us since the epoch) of the last change of state or key; a verdict with a lower number is late.';
COMMENT ON COLUMN connectors.strikes IS 'Runs in a row that met an unexplained 401; suspect_since: a dead key whose verdict waits.';
CREATE UNIQUE INDEX connectors_name ON connectors (tenant_id, name) WHERE deleted_at IS NULL;
CREATE UNIQUE INDEX connectors_workspace ON connectors (tenant_id, workspace_id)
    WHERE deleted_at IS NULL AND workspace_id IS NOT NULL;
CREATE UNIQUE INDEX connectors_key ON connectors (tenant_id, key_fingerprint)
    WHERE deleted_at IS NULL AND key_fingerprint IS NOT NULL;
CREATE INDEX connectors_due ON connectors (next_sync_at) WHERE next_sync_at IS NOT NULL;
CREATE INDEX connectors_polled ON connectors (last_polled_at);
CREATE INDEX connectors_suspect ON connectors (suspect_since) WHERE suspect_since IS NOT NULL;

CREATE TABLE connector_access (
    connector_id        uuid NOT NULL REFERENCES connectors ON DELETE CASCADE,
    dataset             text NOT NULL,
    state               text NOT NULL DEFAULT 'unknown'
                        CHECK (state IN ('granted', 'denied', 'unavailable', 'unknown')),
    reason              text,
    missing_permission  text,
    checked_at          timestamptz,
    version             bigint NOT NULL DEFAULT 0,
    claimed             bigint NOT NULL DEFAULT 0,
    lease_until         timestamptz,
    PRIMARY KEY (connector_id, dataset)
) WITH (fillfactor = 70);

CREATE TABLE members (
    tenant_id      text NOT NULL,
    connector_id   uuid NOT NULL,
    user_id        text NOT NULL,
    email          text,
    first_name     text,
    seat_type      text,
    is_owner       boolean NOT NULL,
    is_locked      boolean NOT NULL,
    version        bigint NOT NULL,
    first_seen_at  timestamptz NOT NULL DEFAULT now(),
    changed_at     timestamptz NOT NULL DEFAULT now(),
    removed_at     timestamptz,
    PRIMARY KEY (connector_id, user_id)
);

CREATE TABLE groups (
    tenant_id      text NOT NULL,
    connector_id   uuid NOT NULL,
    group_id       text NOT NULL,
    name           text NOT NULL,
    member_ids     text[] NOT NULL,
    permissions    text[],
    usage_limit    text,
    version        bigint NOT NULL,
    first_seen_at  timestamptz NOT NULL DEFAULT now(),
    changed_at     timestamptz NOT NULL DEFAULT now(),
    removed_at     timestamptz,
    PRIMARY KEY (connector_id, group_id)
);

CREATE TABLE service_accounts (
    tenant_id           text NOT NULL,
    connector_id        uuid NOT NULL,
    service_account_id  text NOT NULL,
    name                text NOT NULL,
    created_at          timestamptz,
    sharing             jsonb NOT NULL,
    version             bigint NOT NULL,
    first_seen_at       timestamptz NOT NULL DEFAULT now(),
    changed_at          timestamptz NOT NULL DEFAULT now(),
    removed_at          timestamptz,
    PRIMARY KEY (connector_id, service_account_id)
);

CREATE TABLE api_keys (
    tenant_id                    text NOT NULL,
    connector_id                 uuid NOT NULL,
    key_id                       text NOT NULL,
    service_account_id           text NOT NULL,
    name                         text NOT NULL,
    hint                         text,
    key_hash                     text,
    permissions                  text[],
    created_at                   timestamptz,
    expires_at                   timestamptz,
    is_disabled                  boolean NOT NULL,
    disable_reason               text,
    character_limit              bigint,
    allowed_ips                  text[],
    third_party_disable_allowed  boolean,
    platform_limits              jsonb,
    version                      bigint NOT NULL,
    first_seen_at                timestamptz NOT NULL DEFAULT now(),
    changed_at                   timestamptz NOT NULL DEFAULT now(),
    removed_at                   timestamptz,
    PRIMARY KEY (connector_id, key_id)
);

CREATE TABLE credit_usage (
    tenant_id     text NOT NULL,
    connector_id  uuid NOT NULL,
    dimension     text NOT NULL CHECK (dimension IN ('product', 'member', 'api_key')),
    bucket_start  date NOT NULL,
    bucket_key    text NOT NULL,
    unit          text NOT NULL,
    label         text,
    amount        numeric NOT NULL,
    version       bigint NOT NULL,
    PRIMARY KEY (connector_id, dimension, bucket_start, bucket_key, unit)
);
COMMENT ON COLUMN credit_usage.bucket_key IS 'Empty: usage that the provider attributes to nobody.';

CREATE TABLE usage_coverage (
    tenant_id     text NOT NULL,
    connector_id  uuid NOT NULL,
    dimension     text NOT NULL,
    day           date NOT NULL,
    state         text NOT NULL CHECK (state IN ('complete', 'provisional', 'unavailable')),
    observed_at   timestamptz NOT NULL,
    version       bigint NOT NULL,
    PRIMARY KEY (connector_id, dimension, day)
);
COMMENT ON TABLE usage_coverage IS 'A day without a row was not fetched; it is not zero.';

CREATE TABLE sync_runs (
    id             uuid PRIMARY KEY,
    connector_id   uuid NOT NULL,
    tenant_id      text NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('backfill', 'poll', 'reconcile')),
    requested_by   text NOT NULL,
    status         text NOT NULL CHECK (status IN
                   ('queued', 'running', 'succeeded', 'partial', 'failed', 'refused', 'cancelled')),
    parts_total    integer NOT NULL DEFAULT 0,
    parts_done     integer NOT NULL DEFAULT 0,
    parts_failed   integer NOT NULL DEFAULT 0,
    created_at     timestamptz NOT NULL DEFAULT now(),
    started_at     timestamptz,
    finished_at    timestamptz,
    error_reason   text,
    warnings       jsonb NOT NULL DEFAULT '[]'
) WITH (fillfactor = 70);
COMMENT ON COLUMN sync_runs.warnings IS 'What a run noticed without failing: usage totals that differ across dimensions.';
CREATE INDEX sync_runs_connector ON sync_runs (connector_id, created_at DESC);
CREATE UNIQUE INDEX sync_runs_active ON sync_runs (connector_id, kind) WHERE status IN ('queued', 'running');
CREATE INDEX sync_runs_finished ON sync_runs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX sync_runs_open ON sync_runs (created_at) WHERE status IN ('queued', 'running');

CREATE TABLE sync_parts (
    id            uuid PRIMARY KEY,
    run_id        uuid NOT NULL REFERENCES sync_runs ON DELETE CASCADE,
    connector_id  uuid NOT NULL,
    kind          text NOT NULL,
    dataset       text NOT NULL,
    window_start  date,
    window_end    date,
    status        text NOT NULL DEFAULT 'queued' CHECK (status IN
                  ('queued', 'running', 'waiting', 'succeeded', 'failed', 'skipped')),
    attempts      integer NOT NULL DEFAULT 0,
    not_before    timestamptz NOT NULL DEFAULT now(),
    lease_until   timestamptz,
    lane          smallint,
    claimed       bigint,
    published_at  timestamptz,
    worker        text,
    error_class   text,
    error_reason  text,
    records       integer NOT NULL DEFAULT 0,
    changes       integer NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
COMMENT ON COLUMN sync_parts.lane IS 'One of the connector''s places for a request in flight, held from sending until asked.';
COMMENT ON COLUMN sync_parts.worker IS 'The process that claimed it: when that falls silent the part is due again.';
COMMENT ON COLUMN sync_parts.published_at IS 'When its observation went to the stream: from then on it waits for the writer.';
CREATE INDEX sync_parts_run ON sync_parts (run_id);
CREATE INDEX sync_parts_open ON sync_parts (connector_id) WHERE status IN ('queued', 'running', 'waiting');
CREATE INDEX sync_parts_due ON sync_parts (not_before) WHERE status IN ('queued', 'running', 'waiting');

CREATE TABLE deletion_holds (
    id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id       text NOT NULL,
    connector_id    uuid NOT NULL REFERENCES connectors ON DELETE CASCADE,
    dataset         text NOT NULL,
    known           integer NOT NULL,
    missing         integer NOT NULL,
    missing_digest  text NOT NULL,
    runs            integer NOT NULL,
    state           text NOT NULL CHECK (state IN ('open', 'released', 'rejected', 'closed')),
    records         jsonb NOT NULL,
    released        text[] NOT NULL DEFAULT '{}',
    first_seen_at   timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz,
    released_by     text
);
COMMENT ON COLUMN deletion_holds.records IS 'By subject: [runs it was missing in a row, the last such run].';
COMMENT ON COLUMN deletion_holds.released IS 'Subjects an operator let go; valid until expires_at.';
CREATE UNIQUE INDEX deletion_holds_open ON deletion_holds (connector_id, dataset) WHERE state IN ('open', 'released');

CREATE TABLE announcements (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    seq           bigint GENERATED ALWAYS AS IDENTITY,
    tenant_id     text NOT NULL,
    connector_id  uuid NOT NULL,
    partition     integer NOT NULL,
    type          text NOT NULL,
    subject       text NOT NULL,
    run_id        uuid,
    data          jsonb NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    published_at  timestamptz
);
CREATE INDEX announcements_unpublished ON announcements (partition, seq) WHERE published_at IS NULL;
CREATE INDEX announcements_connector ON announcements (connector_id);

CREATE TABLE workers (
    name     text PRIMARY KEY,
    role     text NOT NULL,
    slots    integer NOT NULL DEFAULT 0,
    seen_at  timestamptz NOT NULL DEFAULT now(),
    details  jsonb NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE workers IS 'Heartbeats: how many slots there are to fill, and whether each process makes progress.';

CREATE VIEW seat_counts WITH (security_invoker = true) AS
SELECT tenant_id, connector_id, coalesce(seat_type, 'none') AS seat_type,
       count(*) AS members, count(*) FILTER (WHERE is_locked) AS locked
FROM members WHERE removed_at IS NULL
GROUP BY tenant_id, connector_id, coalesce(seat_type, 'none');

CREATE VIEW api_key_use WITH (security_invoker = true) AS
SELECT k.tenant_id, k.connector_id, k.key_id,
       max(u.bucket_start) FILTER (WHERE u.amount > 0) AS last_used_on,
       coalesce(sum(u.amount) FILTER (
           WHERE u.unit = 'credits' AND u.bucket_start > (now() AT TIME ZONE 'UTC')::date - 30), 0) AS credits_30d
FROM api_keys k
LEFT JOIN credit_usage u ON u.connector_id = k.connector_id AND u.dimension = 'api_key' AND u.bucket_key = k.key_hash
WHERE k.removed_at IS NULL
GROUP BY k.tenant_id, k.connector_id, k.key_id;

-- Readers other than the owner see one tenant: SET rollcall.tenant_id = '...'.
DO $$
DECLARE t text;
BEGIN
    FOREACH t IN ARRAY ARRAY['connectors', 'members', 'groups', 'service_accounts', 'api_keys', 'credit_usage',
                             'usage_coverage', 'sync_runs', 'deletion_holds', 'announcements'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
        EXECUTE format('CREATE POLICY tenant ON %I FOR SELECT USING
                        (tenant_id = nullif(current_setting(''rollcall.tenant_id'', true), ''''))', t);
    END LOOP;
    FOREACH t IN ARRAY ARRAY['connector_access', 'sync_parts'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
        EXECUTE format('CREATE POLICY tenant ON %I FOR SELECT USING (EXISTS (SELECT 1 FROM connectors c
                        WHERE c.id = %I.connector_id AND c.tenant_id =
                        nullif(current_setting(''rollcall.tenant_id'', true), '''')))', t, t);
    END LOOP;
END $$;
