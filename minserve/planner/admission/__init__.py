"""Who is promised its SLO: review of commitments, prefill rates, the dynamic program."""
