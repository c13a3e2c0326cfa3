-- What a step of the ledger does not move should not be in an index: else Postgres writes all indexes of the row anew.

ALTER TABLE sync_parts ADD COLUMN
    open boolean NOT NULL GENERATED ALWAYS AS (status IN ('queued', 'running', 'waiting')) STORED;
COMMENT ON COLUMN sync_parts.open IS 'Stands in the index for the status, which every step of a part moves.';
DROP INDEX sync_parts_open, sync_parts_due;
CREATE INDEX sync_parts_open ON sync_parts (connector_id) WHERE open;

-- Nearly every live connector was polled within the window that is asked for: reading the table costs no more.
DROP INDEX connectors_polled;
ALTER TABLE connectors SET (fillfactor = 70);
