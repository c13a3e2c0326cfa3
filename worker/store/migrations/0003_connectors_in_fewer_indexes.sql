-- Written at the end of every poll, and never read: the one query for it also asks for what no index has.
-- (Apart from the parts, since whoever works locks connectors and parts in either order.)

DROP INDEX connectors_polled;
-- Room beside what is written from now on, so that a poll's end stays on the row's page.
ALTER TABLE connectors SET (fillfactor = 70);
