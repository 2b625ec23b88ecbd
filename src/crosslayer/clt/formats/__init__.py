"""Transcoder folders, one adapter file a format. Nothing is ever unpickled."""
