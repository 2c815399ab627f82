"""The catalogue's tables. A change of them is one more migration; what stands here is never edited."""

FIRST = """
CREATE TABLE collections (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, description TEXT NOT NULL, owner TEXT NOT NULL, shares TEXT NOT NULL,
    embedder TEXT NOT NULL, fingerprint TEXT NOT NULL, chunk_size INTEGER NOT NULL, chunk_overlap INTEGER NOT NULL,
    created REAL NOT NULL, UNIQUE (owner, name)
);
CREATE TABLE documents (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    collection TEXT NOT NULL REFERENCES collections ON DELETE CASCADE,
    name TEXT NOT NULL, live INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, recipe TEXT NOT NULL,
    pages INTEGER NOT NULL, characters INTEGER NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL,
    media_type TEXT NOT NULL, tags TEXT NOT NULL, created REAL NOT NULL, UNIQUE (collection, name, live)
);
CREATE INDEX documents_sha256 ON documents (sha256);
CREATE TABLE texts (
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE, start INTEGER NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (document, start)
);
CREATE TABLE chunks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE, position INTEGER NOT NULL,
    start INTEGER NOT NULL, end INTEGER NOT NULL, page INTEGER, heading TEXT NOT NULL, text TEXT NOT NULL,
    enabled INTEGER NOT NULL DEFAULT 1, UNIQUE (document, position)
);
CREATE TABLE vectors (
    chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE, vector BLOB NOT NULL
);
CREATE TABLE forgotten (
    number INTEGER PRIMARY KEY AUTOINCREMENT, collection TEXT NOT NULL, chunk TEXT NOT NULL DEFAULT ''
);
CREATE TABLE loose (
    sha256 TEXT PRIMARY KEY
);
CREATE TRIGGER document_deleted AFTER DELETE ON documents BEGIN
    INSERT OR IGNORE INTO loose VALUES (old.sha256); END;
"""

READ_ONCE = """
ALTER TABLE collections ADD COLUMN read INTEGER NOT NULL DEFAULT 0;
ALTER TABLE documents ADD COLUMN wanted INTEGER;
ALTER TABLE documents ADD COLUMN read TEXT;
CREATE TABLE states (
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE, chunk INTEGER NOT NULL, id TEXT NOT NULL,
    PRIMARY KEY (document, chunk)
);
CREATE INDEX states_id ON states (id);
CREATE TABLE unneeded (
    id TEXT PRIMARY KEY
);
CREATE TRIGGER state_deleted AFTER DELETE ON states BEGIN
    INSERT OR IGNORE INTO unneeded VALUES (old.id); END;
"""
"""`wanted`: whether the model reads the document, where it is set otherwise than for its collection; chunk 0: whole."""

MIGRATIONS = (FIRST, READ_ONCE)
