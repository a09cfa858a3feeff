"""From the raw folder to the report: steps that are functions of files, and engines that run what is missing."""
