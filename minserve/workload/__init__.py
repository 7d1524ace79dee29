"""Load to try a server with: scenarios, traces, an open-loop client, reports and plots."""
