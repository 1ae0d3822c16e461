"""Token datasets on disk: their format, reader, writer, manifest and verification."""
