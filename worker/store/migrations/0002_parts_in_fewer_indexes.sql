-- A part's status is moved by each of its steps: with the status in an index, every step writes all indexes anew.

DROP INDEX sync_parts_open, sync_parts_due;
ALTER TABLE sync_parts ADD COLUMN
    open boolean NOT NULL GENERATED ALWAYS AS (status IN ('queued', 'running', 'waiting')) STORED;
COMMENT ON COLUMN sync_parts.open IS 'Stands in the index for the status, which every step of a part moves.';
CREATE INDEX sync_parts_open ON sync_parts (connector_id) WHERE open;
ANALYZE sync_parts;
