"""Resolve, build, open and check runs. Importing this package registers the resolvers that conf/ uses."""

from src.config import resolvers as resolvers
