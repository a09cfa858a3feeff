"""Methods side by side: runs what is missing, then one table with the difference to the supervised twin."""
