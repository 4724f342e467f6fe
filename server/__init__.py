"""The HTTP server: lookups in front, FastAPI behind, tables that follow the store."""
