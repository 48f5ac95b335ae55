"""The native backend: passes in C++ on a CPU, compiled on first use."""
