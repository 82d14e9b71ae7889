"""The version of this software. A checkout has no package metadata to ask, so it is written here as well."""

VERSION = "0.1.0"
