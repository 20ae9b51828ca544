"""Images in folders and archives: found, read and cached."""
